"""The experiment of the plane end to end, with a very small flow."""

import dataclasses

import pytest
import torch

from predoc_lib import results
from predoc_lib.cnf import CNF
from predoc_lib.data.densities import DENSITIES, Mixture, density
from predoc_lib.experiments import flow2d
from predoc_lib.experiments.config import ConfigError, build
from predoc_lib.experiments.flow2d import OBJECTIVES, Config, PlanarField, Points, fit_mixture, gap, load, measure, run

TINY = Config(steps=3, batch_size=8, width=8, frequencies=2, n_test=200, device="cpu")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_leaves_a_record_and_weights_that_measure_the_same(tmp_path, objective):
    config = dataclasses.replace(TINY, objective=objective)
    rec = run(config, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == rec
    model, found = load(tmp_path / "run")
    assert found == config
    again = measure(model, found)
    again["mixture"]["seconds"] = rec["metrics"]["mixture"]["seconds"]
    assert again == rec["metrics"]


def test_a_run_learns(tmp_path):
    config = dataclasses.replace(TINY, steps=150, batch_size=256, width=64, ema=0.0, n_test=2000)
    rec = run(config, tmp_path / "run", progress=False)
    untrained = gap(flow2d.precise(flow2d.build_model(config)), density("gaussians"), some_points(config))
    assert rec["metrics"]["gap"] < untrained.mean() - 0.3


def some_points(config):
    return density(config.density).sample(2000, torch.Generator().manual_seed(3))


def test_points_of_a_step_are_the_same_however_they_are_fetched():
    points = Points(TINY)
    whole = points.__getitems__(list(range(8, 16)))
    halves = [points.__getitems__(list(range(8, 12))), points.__getitems__(list(range(12, 16)))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, points.__getitems__(list(range(16, 24))))


def test_an_untrained_field_moves_nothing():
    field = PlanarField(8, 4, 1.0)
    x = torch.randn(5, 2)
    assert torch.equal(field(torch.tensor(0.3), x), torch.zeros(5, 2))
    assert torch.equal(field(torch.rand(5), x), torch.zeros(5, 2))


def test_one_time_for_all_points_is_as_the_same_time_for_each():
    field = PlanarField(8, 4, 1.0)
    torch.nn.init.normal_(field.layers[-1].weight)
    x = torch.randn(5, 2)
    assert torch.allclose(field(torch.tensor(0.3), x), field(torch.full((5,), 0.3), x))


def test_the_gap_of_a_gaussian_to_itself_is_nothing():
    class Still(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, t, x):
            return self.weight * x

    normal = Mixture(torch.zeros(1, 2), 1.0)
    assert gap(CNF(Still(), (2,)), normal, torch.randn(50, 2)).abs().max() < 1e-5


def test_a_mixture_of_gaussians_finds_the_density_that_is_one():
    found = fit_mixture(dataclasses.replace(TINY, n_test=5000), density("gaussians"), some_points(TINY))
    assert found["components"] == 8
    assert abs(found["gap"]) < 0.05


@pytest.mark.parametrize("name", DENSITIES)
def test_every_density_trains(tmp_path, name):
    rec = run(dataclasses.replace(TINY, density=name), tmp_path / "run", progress=False)
    assert rec["data"]["name"] == name
    assert rec["metrics"]["entropy"] == density(name).entropy()


@pytest.mark.parametrize("objective", ["likelihood", "rnode"])
def test_a_likelihood_is_not_compiled(objective):
    with pytest.raises(ConfigError, match=f"'compile' must be False for objective '{objective}'"):
        build(Config, objective=objective, compile=True)


def test_an_unknown_density_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="spiral"):
        build(Config, density="spirals")
