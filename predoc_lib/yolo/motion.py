"""Features that move: every cell of a map carries what it holds to another place."""

import torch
from jaxtyping import Float
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
    row, column = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
    place = displacement + torch.stack([column, row]).to(x)
    corner = place.detach().floor()
    content = torch.cat([x, torch.ones_like(priority)], 1)
    total = x.new_zeros(n, c + 3, h * w)
    for shift in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at = corner + x.new_tensor(shift)[:, None, None]
        off = place - at
        inside = ((at >= 0) & (at < at.new_tensor([w, h])[:, None, None])).all(1, keepdim=True)
        weight = (1 - off.abs()).prod(1, keepdim=True) * priority.exp() * inside
        cell = (at[:, 1].clamp(0, h - 1) * w + at[:, 0].clamp(0, w - 1)).long().flatten(1)[:, None]
        arriving = (weight * torch.cat([content, off], 1)).flatten(2)
        total = total.scatter_add(2, cell.expand_as(arriving), arriving)
    total = total.unflatten(2, (h, w))
    arrived = total[:, c : c + 1]
    moved = (total[:, :c] + FIRM * x) / (arrived + FIRM)
    return moved, torch.cat([total[:, c + 1 :] / (arrived + FIRM), arrived], 1)
