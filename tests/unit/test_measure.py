"""Bytes kept for backpropagation, counted by hand."""

import torch
from torch import nn

from predoc_lib.measure import bytes_kept


def test_what_is_saved_is_counted_once_and_what_is_there_anyway_need_not_be():
    layer, x = nn.Linear(3, 3), torch.randn(5, 3, requires_grad=True)
    assert bytes_kept(lambda: layer(x)) == 4 * (15 + 9)  # x and the weight
    assert bytes_kept(lambda: layer(x) + layer(x)) == 4 * (15 + 9)
    assert bytes_kept(lambda: layer(x), besides=layer.parameters()) == 4 * 15
    assert bytes_kept(lambda: torch.exp(layer(x)), besides=[*layer.parameters(), x]) == 4 * 15  # exp saves its result


def test_what_is_given_up_on_the_way_is_not_kept():
    x = torch.randn(5, 3, requires_grad=True)
    assert bytes_kept(lambda: (torch.exp(x), x + 1)[1]) == 0
    assert bytes_kept(lambda: torch.exp(x).detach()) == 0
    with torch.no_grad():
        assert bytes_kept(lambda: torch.exp(x)) == 0


def test_the_gradient_can_still_be_taken():
    x = torch.randn(5, 3, requires_grad=True)
    bytes_kept(lambda: torch.exp(x).sum().backward())
    torch.testing.assert_close(x.grad, x.detach().exp())
