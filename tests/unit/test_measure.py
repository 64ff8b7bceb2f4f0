"""Bytes kept for backpropagation, counted by hand."""

import torch
from torch import nn

from predoc_lib.measure import bytes_kept, peak_bytes


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


def test_the_peak_is_the_most_that_is_there_at_one_time():
    x = torch.zeros(1000, 1000)
    assert 4e6 <= peak_bytes(lambda: x + 1) < 4.1e6
    assert 8e6 <= peak_bytes(lambda: (x + 1) + 1) < 8.1e6
    assert 8e6 <= peak_bytes(lambda: (((x + 1) + 1) + 1) + 1) < 8.1e6, "what is given up does not count"


def test_the_peak_of_a_training_step_holds_what_was_kept_for_it():
    layers = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(100, 100), nn.Tanh())])
    x = torch.randn(1000, 100)
    kept = bytes_kept(lambda: layers(x), besides=[*layers.parameters(), x])
    assert kept == 5 * 4e5
    assert kept < peak_bytes(lambda: layers(x).sum().backward()) < 2 * kept
