"""What predicted features are trained with, against closed forms."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from predoc_lib.yolo import ROAD, Darknet
from predoc_lib.yolo.objectives import (
    FLOOR,
    adversarial,
    class_weights,
    critics,
    divergence,
    gaussian,
    gradient_difference,
    heads_loss,
    mse,
    thing_kinds,
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return Darknet(ROAD).eval().double().requires_grad_(False)


def features(network, batch=2):
    return [3 * torch.randn(batch, *shape, dtype=torch.float64) for shape in network.shapes]


def test_equal_features_have_no_loss(network):
    x = features(network)
    parts = heads_loss(network, x, x)
    assert parts["object"] == parts["kind"] == 0
    assert parts["box"] < 1e-3, "torchvision adds an epsilon to the areas, which small boxes feel"


def test_other_features_have_a_loss_in_each_part(network):
    parts = heads_loss(network, features(network), features(network))
    assert all(part > 1e-3 for part in parts.values())
    assert parts["loss"] == pytest.approx(5 * parts["box"] + parts["object"] + parts["kind"])


def test_every_class_that_is_there_has_the_same_say_and_an_object_counts_one_in_the_mean():
    counts = torch.tensor([3e5, 1e5, 2e4, 0.0], dtype=torch.float64)
    weights = class_weights(counts)
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    say = (weights * counts / counts.sum())[:3]
    torch.testing.assert_close(say, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(class_weights(torch.full((5,), 7.0)), torch.ones(5))
    assert torch.isfinite(class_weights(torch.zeros(3))).all()


def test_what_is_there_is_shared_among_the_classes(network):
    for at, x in zip(network.heads_at, network.logits(features(network)), strict=True):
        yolo = network.layers[at + 1]
        thing = thing_kinds(yolo, x)
        torch.testing.assert_close(thing.sum(-1), yolo.split(x)[..., 4].sigmoid())
        wanted = yolo.split(x)[..., 5:].sigmoid()
        torch.testing.assert_close(thing / thing[..., :1], wanted / wanted[..., :1])


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("part", "number"), [("box", 2), ("object", 4), ("kind", None)])
def test_an_error_costs_more_where_its_class_is_rarer_if_classes_are_balanced(
    network, monkeypatch, balanced, part, number
):
    """The same error in one cell, whose object is of a class that has many or few others."""
    monkeypatch.setattr(network, "logits", lambda x: x)
    logits = [torch.full((1, 24, *shape[1:]), -30.0, dtype=torch.float64) for shape in network.shapes]
    fine = logits[-1].view(1, 3, 8, *logits[-1].shape[2:])  # anchors, numbers, rows, columns
    for column in (0, 2, 4, 6, 8):  # four of class 0, the last of class 1
        fine[0, 0, :4, 1, column] = 0.0
        fine[0, 0, [4, 6 if column == 8 else 5], 1, column] = 30.0

    def cost(column):
        moved = [x.clone() for x in logits]
        kind = 6 if column == 8 else 5
        moved[-1].view_as(fine)[0, 0, kind if number is None else number, 1, column] = 0.5
        return heads_loss(network, moved, logits, balanced)[part].item()

    assert cost(8) / cost(0) == pytest.approx((4 + 1) / (1 + 1) if balanced else 1, rel=1e-3)


def test_descending_the_loss_of_the_heads_brings_back_what_they_find(network):
    true = features(network, 1)
    x = [(y + 0.5 * torch.randn_like(y)).requires_grad_() for y in true]
    optimizer = torch.optim.Adam(x, lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = heads_loss(network, x, true)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_divergence_is_that_of_bernoulli_variables():
    x, y = 4 * torch.randn(2, 50, dtype=torch.float64)
    wanted = kl_divergence(Bernoulli(logits=y), Bernoulli(logits=x))
    torch.testing.assert_close(divergence(x, y), wanted, atol=1e-10, rtol=0)
    assert torch.isfinite(divergence(torch.tensor([800.0]), torch.tensor([-800.0]))).all()


def test_the_mean_squared_error_counts_every_number_once_in_its_unit():
    x = [torch.ones(2, 3, 1, 2, 1), torch.full((2, 3, 1, 1, 1), 5.0)]
    y = [torch.zeros(2, 3, 1, 2, 1), torch.ones(2, 3, 1, 1, 1)]
    scales = [torch.tensor([0.5])[:, None, None], torch.tensor([2.0])[:, None, None]]
    assert mse(x, y, scales) == pytest.approx((12 * 4 + 6 * 4) / 18)


def test_the_gradient_difference_sees_edges_and_no_shift_of_the_level():
    flat = [torch.zeros(1, 1, 1, 2, 3)]
    edge = [torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])[None, None, None]]
    one = [torch.ones(1, 1, 1)]
    # Two of the seven steps between neighbours, four along the rows and three down, have height 1.
    assert gradient_difference(edge, flat, one) == pytest.approx(2 / 7)
    assert gradient_difference([x + 4 for x in edge], edge, one) == 0


def test_where_there_is_nothing_only_objectness_counts():
    nothing = Darknet(ROAD).eval().double().requires_grad_(False)
    for at in nothing.heads_at:
        nothing.layers[at][0].bias.view(3, 8)[:, 4] = -20.0
        nothing.layers[at][0].weight.view(3, 8, -1)[:, 4] = 0.0
    parts = heads_loss(nothing, features(nothing), features(nothing))
    assert parts["box"] == 0
    assert parts["kind"] < 1e-3


def test_the_gaussian_likelihood_is_that_of_each_channels_own_variance():
    torch.manual_seed(0)
    true = [torch.randn(2, 3, c, 4, 5, dtype=torch.float64) for c in (2, 3)]
    spread = [torch.rand(c, 1, 1, dtype=torch.float64) + 0.1 for c in (2, 3)]
    predicted = [y + std * torch.randn_like(y) for y, std in zip(true, spread, strict=True)]
    ones = [torch.ones(c, 1, 1, dtype=torch.float64) for c in (2, 3)]
    least = 0.0
    for x, y in zip(predicted, true, strict=True):
        std = (x - y).square().mean((0, 1, 3, 4), keepdim=True).add(FLOOR).sqrt()
        least = least - Normal(x, std.expand_as(x)).log_prob(y).sum()
        assert -Normal(x, 1.1 * std.expand_as(x)).log_prob(y).sum() > -Normal(x, std.expand_as(x)).log_prob(y).sum()
    numbers = sum(y.numel() for y in true)
    constant = 0.5 + 0.5 * math.log(2 * math.pi)  # of each number, at the best variance
    assert gaussian(predicted, true, ones).item() == pytest.approx(least.item() / numbers - constant, abs=1e-4)


def test_critics_descend_the_game_that_predicted_features_climb(network):
    torch.manual_seed(0)
    judges = critics(network.shapes, 4).double()
    scales = [torch.full((shape[0], 1, 1), 2.0 + k, dtype=torch.float64) for k, shape in enumerate(network.shapes)]
    true = [torch.stack([x, x + 3], 1) for x in features(network)]
    made = [(x + 1).requires_grad_() for x in true]
    loss = adversarial(judges, made, true, scales)
    loss.backward()
    honest = 0
    for k, (judge, x, y) in enumerate(zip(judges, made, true, strict=True)):
        words = [[judge(z[:, t] / (2 + k)).sigmoid() for t in (0, 1)] for z in (x, y)]
        made_up, real = (torch.stack(word) for word in words)
        honest = honest - ((1 - made_up).log().mean() + real.log().mean()) / 2
    torch.testing.assert_close(loss, honest)
    weights = list(judges.parameters())
    gradients = torch.autograd.grad(honest, [*weights, *made])
    for found, gradient in zip(weights, gradients[: len(weights)], strict=True):
        torch.testing.assert_close(found.grad, gradient)
    for found, gradient in zip(made, gradients[len(weights) :], strict=True):
        torch.testing.assert_close(found.grad, -gradient)
