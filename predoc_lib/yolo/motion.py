"""Features that move: every cell of a map carries what it holds to another place."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRM = 1e-2  # share of what stays behind in a cell: all of it where nothing arrives, next to nothing elsewhere


def splat(
    x: Float[Tensor, "N c h w"], displacement: Float[Tensor, "N 2 h w"], priority: Float[Tensor, "N 1 h w"]
) -> tuple[Float[Tensor, "N c h w"], Float[Tensor, "N 3 h w"]]:
    """Carry every cell's features to where it moves, shared among the four cells around that place.

    Several that arrive in one cell are averaged, weighted by their nearness and by exp(priority), so that what is in
    front can win (softmax splatting, Niklaus and Liu 2020). A cell where nothing arrives keeps its own features.

    Args:
        x: features.
        displacement: (dx, dy) of each cell, in cells.
        priority: of each cell.

    Returns:
        The features, and of every cell: the mean (dx, dy) from its middle to where its content arrived, and how much
        arrived.
    """
    n, c, h, w = x.shape
    content = torch.cat([x, torch.ones_like(priority)], 1)
    total = x.new_zeros(n, c + 3, h * w)
    for cell, weight, off in arrivals(displacement, priority):
        arriving = (weight * torch.cat([content, off], 1)).flatten(2)
        total = total.scatter_add(2, cell.expand_as(arriving), arriving)
    total = total.unflatten(2, (h, w))
    arrived = total[:, c : c + 1]
    moved = (total[:, :c] + FIRM * x) / (arrived + FIRM)
    return moved, torch.cat([total[:, c + 1 :] / (arrived + FIRM), arrived], 1)


def splat_coarse(
    x: Float[Tensor, "N c H W"],
    displacement: Float[Tensor, "N 2 h w"],
    priority: Float[Tensor, "N 1 h w"],
    arrived: Float[Tensor, "N 1 h w"],
) -> Float[Tensor, "N c H W"]:
    """The same for features on a coarser grid: repeat every cell until it fits, ``splat``, and average again.

    All three are linear in x, so they are one small matrix, from coarse cells to coarse cells, and many channels cost
    little.

    Args:
        x: features; H divides h, and W divides w.
        displacement: (dx, dy) of each fine cell, in fine cells.
        priority: of each fine cell.
        arrived: how much did in each fine cell, the last of what ``splat`` says of arrivals.
    """
    n, _, h, w = displacement.shape
    rows, columns = x.shape[2:]
    of = torch.arange(h, device=x.device)[:, None] // (h // rows) * columns
    of = (of + torch.arange(w, device=x.device) // (w // columns)).flatten()  # every fine cell's coarse one
    share = (rows * columns) / (h * w) / (arrived + FIRM).flatten(1)  # of a fine cell, in the mean
    size = rows * columns
    matrix = torch.diag_embed(x.new_zeros(n, size).index_add(1, of, FIRM * share)).flatten(1)
    for cell, weight, _ in arrivals(displacement, priority):
        cell = cell[:, 0]
        matrix = matrix.scatter_add(1, of[cell] * size + of, weight.flatten(1) * share.gather(1, cell))
    return (matrix.unflatten(1, (size, size)) @ x.flatten(2).mT).mT.unflatten(2, (rows, columns))


def arrivals(
    displacement: Float[Tensor, "N 2 h w"], priority: Float[Tensor, "N 1 h w"]
) -> Iterator[tuple[Int[Tensor, "N 1 cells"], Float[Tensor, "N 1 h w"], Float[Tensor, "N 2 h w"]]]:
    """Four times: the number of a cell beside the place to which each cell moves, its weight there, and (dx, dy)."""
    h, w = displacement.shape[2:]
    row, column = (torch.arange(side, device=displacement.device) for side in (h, w))
    row, column = torch.meshgrid(row, column, indexing="ij")
    place = displacement + torch.stack([column, row]).to(displacement)
    corner = place.detach().floor()
    for shift in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at = corner + displacement.new_tensor(shift)[:, None, None]
        off = place - at
        inside = ((at >= 0) & (at < at.new_tensor([w, h])[:, None, None])).all(1, keepdim=True)
        near = 1 - off.abs()
        weight = near[:, :1] * near[:, 1:] * priority.exp() * inside  # a GPU would wait for the gradient of prod
        cell = at[:, 1].clamp(0, h - 1) * w + at[:, 0].clamp(0, w - 1)
        yield cell.long().flatten(1)[:, None], weight, off
