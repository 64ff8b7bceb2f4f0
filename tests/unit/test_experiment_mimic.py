"""The experiments of MiMIc end to end, with very small networks."""

import dataclasses

import pytest
import torch

from predoc_lib import results
from predoc_lib.experiments import mimic, mimic_dusk, mimic_sprites
from predoc_lib.experiments.mimic import Config, Labelled, load, measure, read, run
from predoc_lib.mimic import MiMIc
from predoc_lib.mimic.dependence import gaussian_copula

TINY = Config(steps=3, batch_size=16, critic_width=8, channels=4, device="cpu")
DUSK = mimic_dusk.Config(
    steps=3, batch_size=4, critic_width=8, width=4, n_train=4, n_test=3, evaluate_every=2, device="cpu"
)
SPRITES = mimic_sprites.Config(steps=2, batch_size=16, critic_width=8, device="cpu")


@pytest.mark.parametrize("place", mimic.PLACES)
@pytest.mark.parametrize("method", mimic.METHODS)
def test_every_place_leaves_a_record_and_weights_that_measure_the_same(tmp_path, place, method):
    config = dataclasses.replace(TINY, place=place, method=method)
    record = run(config, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    model, found = load(tmp_path / "run")
    assert found == config
    again = measure(model, read("digits", "test"))
    for layer in ("first", "penultimate"):
        watched = method == "mimic" and layer in mimic.PLACES[place]
        assert ("critic" in record["metrics"][layer]) == watched
        assert again[layer] == record["metrics"][layer]
    assert again["accuracy"] == record["metrics"]["accuracy"]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, steps=4, evaluate_every=2, critic_steps=3)
    whole = run(config, tmp_path / "whole", progress=False)
    calls = []

    class Stopped(Exception):
        pass

    cross_entropy = torch.nn.functional.cross_entropy

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return cross_entropy(*arguments)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", stopping)
    with pytest.raises(Stopped):
        run(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    again = run(config, tmp_path / "run", progress=False)
    assert again["metrics"] == whole["metrics"]


def test_paying_takes_dependence_out_of_the_layer():
    plain, paid = (
        run(Config(steps=150, batch_size=128, critic_width=32, weight=0.3, place=place, device="cpu"), progress=False)
        for place in ("none", "penultimate")
    )
    before, after = (record["metrics"]["penultimate"] for record in (plain, paid))
    assert after["copula"] < before["copula"]
    assert after["rank"] > 1


def test_decorrelation_takes_correlation_out_of_the_layer():
    config = Config(steps=80, batch_size=128, method="decorrelation", weight=0.1, device="cpu")
    plain, paid = (run(dataclasses.replace(config, place=p), progress=False) for p in ("none", "penultimate"))
    assert paid["metrics"]["penultimate"]["copula"] < 0.5 * plain["metrics"]["penultimate"]["copula"]


def test_the_variable_of_a_layer_is_the_same_in_every_call():
    torch.manual_seed(0)
    model = mimic.build_model(TINY)
    images = read("digits", "test").images[:50]
    for layer, shape in (("first", (50, 4)), ("penultimate", (50, 4))):
        x = mimic.features(model.net, images, layer)
        assert x.shape == shape
        assert torch.equal(x, mimic.features(model.net, images, layer))
        assert gaussian_copula(x) > 0


@pytest.mark.parametrize("method", mimic_sprites.METHODS)
def test_every_way_with_codes_leaves_scores(method):
    config = dataclasses.replace(SPRITES, method=method, weight=2.0)
    record = mimic_sprites.run(config, progress=False)
    assert record["config"]["method"] == method
    assert set(record["metrics"]["scores"]) == set(record["metrics"]["components"])
    assert all(0 <= value <= 1 for value in record["metrics"]["scores"].values())


def test_the_losses_of_the_family_are_each_others_special_cases():
    torch.manual_seed(0)
    images, noise = torch.rand(16, 1, 32, 32), torch.randn(16, 6)
    model = mimic_sprites.build_model(SPRITES)

    def loss(method, weight):
        config = dataclasses.replace(SPRITES, method=method, weight=weight)
        return mimic_sprites.objective(model, images, config, noise)["loss"].item()

    vae = loss("vae", 9.0)
    assert loss("beta_vae", 1.0) == pytest.approx(vae, rel=1e-6)
    assert loss("beta_tcvae", 1.0) == pytest.approx(vae, rel=1e-6)
    assert loss("beta_vae", 4.0) > vae
    assert loss("decorrelation", 0.0) == pytest.approx(loss("plain", 1.0), rel=1e-6)


def test_a_factor_vaes_critic_learns_the_ratio_of_joint_and_product():
    # The best logit of two Gaussians is log p - log q, whose mean is the total correlation.
    torch.manual_seed(0)
    r = 0.8
    root = torch.linalg.cholesky(torch.tensor([[1, r], [r, 1]]))
    net = torch.nn.Sequential(torch.nn.Identity())
    model = MiMIc(net, ["0"], example=torch.zeros(2, 2), width=32)
    model.critics["code"] = model.critics.pop("0")
    optimizer = torch.optim.Adam(model.critics.parameters(), lr=1e-2)
    for _ in range(250):
        model.features["code"] = torch.randn(512, 2) @ root.T
        optimizer.zero_grad()
        mimic_sprites.classification(model).backward()
        optimizer.step()
    x = torch.randn(20_000, 2) @ root.T
    model.features["code"] = x
    found = mimic_sprites.log_ratio(model).item()
    assert found == pytest.approx(-0.5 * torch.tensor(1 - r * r).log().item(), abs=0.08)


def test_labelled_images_are_those_of_the_set():
    data = read("digits", "test")
    assert isinstance(data, Labelled)
    assert data.images.shape[1:] == (1, 8, 8)
    assert set(data.classes.tolist()) == set(range(10))


@pytest.mark.parametrize("method", mimic_dusk.METHODS)
def test_every_way_by_day_is_measured_at_dusk(tmp_path, method):
    record = mimic_dusk.run(dataclasses.replace(DUSK, method=method), tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    assert set(record["metrics"]["iou"]) == {"day", "dusk", "matched", "commonest"}
    assert all(0 <= value <= 1 for value in record["metrics"]["iou"].values())
    assert ("interaction" in record["history"][-1]) == (method == "mimic")


def test_dusk_is_the_same_drives_in_another_light():
    (day, true), (dusk, same) = (mimic_dusk.scenes(3, "test", light) for light in ("day", "dusk"))
    both, masks = mimic_dusk.scenes(3, "test", "both")
    assert torch.equal(true, same)
    assert dusk.float().mean() < 0.9 * day.float().mean()
    assert torch.equal(both, torch.cat([day, dusk]))
    assert torch.equal(masks, torch.cat([true, true]))


def test_matched_images_have_the_colours_of_others():
    torch.manual_seed(0)
    images, like = torch.rand(2, 3, 8, 8) * 0.2, 0.4 + 0.2 * torch.rand(5, 3, 8, 8)
    found = mimic_dusk.match(images, like)
    torch.testing.assert_close(found.mean((2, 3)), like.mean((0, 2, 3)).expand(2, 3))
    torch.testing.assert_close(found.std((2, 3)), like.std((2, 3)).mean(0).expand(2, 3))


@pytest.mark.slow
def test_two_processes_train_network_and_critics_together():
    config = dataclasses.replace(TINY, steps=6, critic_steps=2, place="both")
    record = run(config, progress=False, num_processes=2)
    assert set(record["history"][-1]) >= {"task", "interaction_first", "interaction_penultimate"}


@pytest.mark.slow
def test_two_processes_train_every_way_with_codes():
    for method in mimic_sprites.METHODS:
        record = mimic_sprites.run(dataclasses.replace(SPRITES, method=method), progress=False, num_processes=2)
        assert record["config"]["method"] == method


def test_a_factor_vaes_critic_has_its_own_loss_in_every_step(monkeypatch):
    calls = []
    own = mimic_sprites.classification
    monkeypatch.setattr(mimic_sprites, "classification", lambda mimic: calls.append(1) or own(mimic))
    monkeypatch.setattr(MiMIc, "critic_loss", lambda self: pytest.fail("another critic's loss"))
    mimic_sprites.run(dataclasses.replace(SPRITES, method="factor_vae", critic_steps=3), progress=False)
    assert len(calls) == 3 * SPRITES.steps
