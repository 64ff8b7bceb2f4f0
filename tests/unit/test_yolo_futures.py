"""Many futures of one past, against what their definitions say."""

import pytest
import torch
from torch.distributions import Normal

from predoc_lib.yolo.dynamics import CopyLast
from predoc_lib.yolo.futures import RandomFeatureODE

SHAPES = [(3, 2, 2), (2, 4, 4)]
T = torch.arange(6.0)


def problem(seed=0):
    torch.manual_seed(seed)
    model = RandomFeatureODE(SHAPES, width=6, noise=4)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model, [torch.randn(2, 6, *shape) for shape in SHAPES]


def seen(features):
    return [x[:, :3] for x in features]


def test_an_untrained_model_is_copy_last_whatever_it_draws():
    model, features = RandomFeatureODE(SHAPES, width=6), problem()[1]
    wanted = CopyLast().predict(seen(features), T[:3], T[3:])
    for guess in [model.predict(seen(features), T[:3], T[3:]), *model.futures(seen(features), T[:3], T[3:], 2)]:
        for x, y in zip(guess, wanted, strict=True):
            torch.testing.assert_close(x, y)


def test_futures_differ_and_a_prior_without_spread_gives_its_mean():
    model, features = problem()
    one, other = model.futures(seen(features), T[:3], T[3:], 2)
    assert (one[0] - other[0]).abs().max() > 1e-3
    model.prior.weight.data[4:], model.prior.bias.data[4:] = 0, -100.0
    for x, y in zip(
        model.futures(seen(features), T[:3], T[3:], 1)[0], model.predict(seen(features), T[:3], T[3:]), strict=True
    ):
        torch.testing.assert_close(x, y, atol=0.02, rtol=0.02)


def test_the_prior_knows_nothing_of_the_future_and_the_posterior_does():
    model, features = problem()
    changed = [torch.cat([x[:, :3], x[:, 3:] + 1], 1) for x in features]
    for x, y in zip(*(model.predict(seen(z), T[:3], T[3:]) for z in (features, changed)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    guesses = []
    for z in (features, changed):
        torch.manual_seed(0)
        guesses.append(model.guided(z, T, 3)[0])
    assert (guesses[0][0] - guesses[1][0]).abs().max() > 1e-3


def test_the_divergence_is_the_mean_of_the_log_ratio():
    """By a draw of the posterior's own numbers, 4 standard errors."""
    torch.manual_seed(0)
    q, p = (RandomFeatureODE.normal(torch.randn(1, 4, 1, 1)) for _ in range(2))
    z = q.sample((20_000,))
    ratio = (q.log_prob(z) - p.log_prob(z)).sum((2, 3, 4))
    model, features = problem()
    normals = iter((p, q))
    model.normal = lambda parameters: next(normals)
    model.inject.forward = lambda z: 0.0
    kl = model.guided([x[:1] for x in features], T, 3)[1]
    assert isinstance(q, Normal)
    assert kl.item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / len(ratio) ** 0.5)
