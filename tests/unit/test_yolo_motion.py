"""Features that move, against loops and closed forms."""

import math

import pytest
import torch
from torch.nn import functional as F

from predoc_lib.yolo.motion import FIRM, splat, splat_coarse


def in_loops(x, displacement, priority):
    """One map's features and what arrived, cell by cell."""
    h, w = x.shape[1:]
    total, weights, off = torch.zeros_like(x), torch.zeros(1, h, w).to(x), torch.zeros(2, h, w).to(x)
    for i in range(h):
        for j in range(w):
            to_x, to_y = j + float(displacement[0, i, j]), i + float(displacement[1, i, j])
            for row in (math.floor(to_y), math.floor(to_y) + 1):
                for column in (math.floor(to_x), math.floor(to_x) + 1):
                    if 0 <= row < h and 0 <= column < w:
                        near = (1 - abs(to_y - row)) * (1 - abs(to_x - column))
                        weight = near * math.exp(float(priority[0, i, j]))
                        total[:, row, column] += weight * x[:, i, j]
                        weights[0, row, column] += weight
                        off[:, row, column] += weight * torch.tensor([to_x - column, to_y - row], dtype=x.dtype)
    return (total + FIRM * x) / (weights + FIRM), torch.cat([off / (weights + FIRM), weights])


def random_problem(n=2, c=3, h=5, w=7, far=3.0):
    x, s, p = (torch.randn(n, k, h, w, dtype=torch.float64) for k in (c, 2, 1))
    return x, far * s, p


def test_a_splat_is_what_loops_over_the_cells_give():
    x, s, p = random_problem()
    moved, arrival = splat(x, s, p)
    for i in range(len(x)):
        wanted, arrived = in_loops(x[i], s[i], p[i])
        torch.testing.assert_close(moved[i], wanted, atol=1e-12, rtol=0)
        torch.testing.assert_close(arrival[i], arrived, atol=1e-12, rtol=0)


def test_without_displacement_nothing_changes():
    x, s, p = random_problem()
    moved, arrival = splat(x, 0 * s, p)
    torch.testing.assert_close(moved, x, atol=1e-12, rtol=0)
    assert (arrival[:, :2] == 0).all()
    torch.testing.assert_close(arrival[:, 2:], p.exp())


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -1), (-3, 2)])
def test_whole_cells_arrive_unblurred(dx, dy):
    x, s, p = random_problem()
    s[:, 0], s[:, 1] = dx, dy
    moved, _ = splat(x, s, 0 * p)
    h, w = x.shape[2:]
    rows, columns = slice(max(0, dy), h + min(0, dy)), slice(max(0, dx), w + min(0, dx))
    source = x[:, :, max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)]
    there = (source + FIRM * x[:, :, rows, columns]) / (1 + FIRM)
    torch.testing.assert_close(moved[:, :, rows, columns], there, atol=1e-12, rtol=0)
    stays = torch.ones(h, w, dtype=torch.bool)
    stays[rows, columns] = False
    torch.testing.assert_close(moved[:, :, stays], x[:, :, stays], atol=1e-12, rtol=0)


def test_of_two_that_meet_the_one_in_front_wins():
    x = torch.tensor([1.0, 0.0, 5.0], dtype=torch.float64)[None, None, None]
    s = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    s[0, 0, 0] = torch.tensor([1.0, 9.0, -1.0])  # both ends meet in the middle, whose own content leaves
    for front, wanted in ((0, 1.0), (2, 5.0)):
        priority = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
        priority[..., front] = 8
        assert splat(x, s, priority)[0][0, 0, 0, 1] == pytest.approx(wanted, abs=0.01)


def test_gradients_are_those_of_finite_differences():
    x, s, p = random_problem(n=1, c=2, h=3, w=4, far=1.0)
    assert ((s - s.round()).abs() > 1e-3).all(), "at whole cells the weights have kinks"
    assert torch.autograd.gradcheck(splat, tuple(v.requires_grad_() for v in (x, s, p)))


@pytest.mark.parametrize("blocks", [(2, 2), (3, 1), (6, 8)])
def test_a_coarse_map_moves_as_it_would_if_repeated_and_averaged_again(blocks):
    _, s, p = random_problem(h=6, w=8)
    x = torch.randn(2, 3, 6 // blocks[0], 8 // blocks[1], dtype=torch.float64)
    moved, arrival = splat(F.interpolate(x, (6, 8), mode="nearest"), s, p)
    coarse = splat_coarse(x, s, p, arrival[:, 2:])
    torch.testing.assert_close(coarse, F.avg_pool2d(moved, blocks), atol=1e-12, rtol=0)
