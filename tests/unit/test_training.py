"""The training loop, and weights on the disk."""

import itertools
import pickle
import re
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from predoc_lib import training
from predoc_lib.training import TrainingError, WeightsError, fit, load_weights, save_weights


class Point(nn.Module):
    """Two numbers to be trained."""

    def __init__(self, *values):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values or (5.0, -3.0)))


GOAL = torch.tensor([1.0, 2.0])


def quadratic(model):
    return lambda step: ((model.x - GOAL) ** 2 * torch.tensor([1.0, 4.0])).sum()


def loaded(folder):
    return safetensors.torch.load_file(folder / "weights.safetensors")["x"]


def test_a_quadratic_is_minimized(tmp_path):
    model = Point()
    history, seconds = fit(model, quadratic(model), steps=500, learning_rate=0.1, evaluate_every=200, folder=tmp_path)
    torch.testing.assert_close(model.x.detach(), GOAL, atol=1e-3, rtol=0)
    assert [row["step"] for row in history] == [200, 400, 500]
    assert history[-1]["loss"] < 1e-4 < history[0]["loss"]
    assert seconds > 0
    assert torch.equal(loaded(tmp_path), model.x.detach())


def test_the_loss_in_the_history_is_the_mean_since_the_last_row():
    model = Point()
    history, _ = fit(model, lambda step: model.x.sum() * 0 + step, steps=5, learning_rate=0.1, evaluate_every=3)
    assert [row["loss"] for row in history] == [2.0, 4.5]


def test_the_learning_rate_warms_up_and_decays_to_zero():
    """With a constant gradient, each of Adam's steps is as long as the learning rate."""
    model, path = Point(0.0), []
    fit(model, lambda step: path.append(model.x.item()) or model.x.sum(), steps=100, learning_rate=0.1)
    path.append(model.x.item())
    lengths = [a - b for a, b in itertools.pairwise(path)]
    assert lengths[0] == pytest.approx(0.01, rel=0.01)
    assert max(lengths) == pytest.approx(0.1, rel=0.05)
    assert lengths.index(max(lengths)) < 12
    assert lengths[-1] < 1e-4


def test_evaluation_is_in_evaluation_mode_without_gradients_and_training_goes_on():
    model, modes = Point(), []

    def evaluate():
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"figure": 7.0}

    def loss(step):
        modes.append((model.training, torch.is_grad_enabled()))
        return quadratic(model)(step)

    history, _ = fit(model, loss, steps=5, learning_rate=0.1, evaluate=evaluate, evaluate_every=2)
    assert [row["figure"] for row in history] == [7.0] * 3
    assert modes == [(True, True)] * 5


def test_seconds_count_training_and_not_evaluation(monkeypatch):
    now = [0.0]

    def spend(seconds):
        now[0] += seconds
        return {}

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model = Point()
    loss = lambda step: spend(1.0) or quadratic(model)(step)  # noqa: E731
    history, seconds = fit(
        model, loss, steps=5, learning_rate=0.1, evaluate=lambda: spend(100.0), evaluate_every=2, progress=False
    )
    assert seconds == 5
    assert [row["seconds"] for row in history] == [2, 4, 5]


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_weights(tmp_path, bad):
    model, kept = Point(), []

    def loss(step):
        return quadratic(model)(step) * (float(bad) if step == 8 else 1)

    def evaluate():
        kept.append(model.x.detach().clone())
        return {}

    with pytest.raises(TrainingError, match=rf"The loss is {bad} at step 8.*the weights of step 6 are kept") as error:
        fit(model, loss, steps=20, learning_rate=0.1, evaluate=evaluate, evaluate_every=3, folder=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "learning_rate" in str(error.value)
    assert len(kept) == 2
    assert torch.equal(loaded(tmp_path), kept[-1])


def test_a_bad_loss_at_once_leaves_no_file(tmp_path):
    model = Point()
    with pytest.raises(TrainingError, match=r"at step 1: .*no weights were saved yet"):
        fit(model, lambda step: model.x.sum() * float("nan"), steps=5, learning_rate=0.1, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_never_reaches_the_saved_weights(tmp_path):
    """sqrt(0) is finite, its gradient is not: the step that would follow ruins every weight."""
    model = Point()

    def loss(step):
        return quadratic(model)(step) + (0 * model.x.sum().abs().sqrt() if step < 6 else (0 * model.x).sum().sqrt())

    with pytest.raises(TrainingError, match="step 6"):
        fit(model, loss, steps=20, learning_rate=0.1, evaluate_every=3, folder=tmp_path)
    assert torch.isfinite(loaded(tmp_path)).all()


def test_ctrl_c_saves_the_weights_and_says_where(tmp_path, capsys):
    model = Point()

    def loss(step):
        if step == 5:
            raise KeyboardInterrupt
        return quadratic(model)(step)

    with pytest.raises(KeyboardInterrupt):
        fit(model, loss, steps=20, learning_rate=0.1, folder=tmp_path, progress=False)
    assert torch.equal(loaded(tmp_path), model.x.detach())
    assert not torch.equal(model.x, Point().x)
    said = capsys.readouterr().err
    assert "step 5" in said
    assert str(tmp_path / "weights.safetensors") in said


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Point()
    fit(model, quadratic(model), steps=3, learning_rate=0.1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bar_is_shown_if_asked_for(capsys):
    model = Point()
    for progress in (True, False):
        fit(
            model, quadratic(model), steps=3, learning_rate=0.1, evaluate=lambda: {"psnr": 12.5}, show="psnr",
            progress=progress,
        )  # fmt: skip
        said = capsys.readouterr().err
        assert ("3/3" in said and "loss" in said and "psnr=12.5" in said) is progress


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "weights.safetensors"
    save_weights(Point(1.0, 2.0), path)
    before = path.read_bytes()

    def half(weights, file):
        file.write_bytes(before[: len(before) // 2])
        raise failure

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(type(failure)):
        save_weights(Point(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saved_weights_are_loaded_bit_by_bit(tmp_path):
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    save_weights(model, tmp_path / "new" / "w.safetensors")
    assert load_weights(other, tmp_path / "new" / "w.safetensors") is other
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_in_half_precision_fill_a_model_in_its_own(tmp_path):
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    save_weights(model, tmp_path / "w.safetensors", torch.float16)
    assert safetensors.torch.load_file(tmp_path / "w.safetensors")["weight"].dtype == torch.float16
    load_weights(other, tmp_path / "w.safetensors")
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, model.weight.half().float())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.zeros(4, 2), "bias": torch.zeros(4)}, r"\[4, 2\] for 'weight', the model \[4, 3\]"),
        ({"weight": torch.zeros(4, 3)}, r"nothing for 'bias', the model \[4\]"),
        (
            {"weight": torch.zeros(4, 3), "bias": torch.zeros(4), "extra": torch.zeros(2)},
            r"\[2\] for 'extra', the model nothing",
        ),
        ({"weight": torch.zeros(12), "bias": torch.zeros(4)}, r"\[12\] for 'weight', the model \[4, 3\]"),
    ],
    ids=["shape", "missing", "extra", "flat"],
)
def test_weights_of_another_model_are_refused_with_both_shapes(tmp_path, weights, message):
    path, model = tmp_path / "w.safetensors", nn.Linear(3, 4)
    safetensors.torch.save_file(weights, path)
    before = model.weight.clone()
    with pytest.raises(WeightsError, match=rf"{re.escape(str(path))} does not fit the model: it has {message}\."):
        load_weights(model, path)
    assert torch.equal(model.weight, before)


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"weight": [1.0] * 12, "bias": [0.0] * 4}))
    elif how == "torch":
        torch.save({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}, path)
    elif how == "absent":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["truncated", "empty", "pickle", "torch", "absent", "folder"])
def test_a_file_that_is_not_whole_safetensors_is_named_and_never_used(tmp_path, how):
    path, model = tmp_path / "w.safetensors", nn.Linear(3, 4)
    save_weights(nn.Linear(3, 4), path)
    damage(path, how)
    before = model.weight.clone()
    with pytest.raises(WeightsError, match=rf"{re.escape(str(path))} cannot be read as safetensors weights"):
        load_weights(model, path)
    assert torch.equal(model.weight, before)


def test_training_names_its_errors_apart():
    assert not issubclass(training.TrainingError, ValueError)
    assert issubclass(training.WeightsError, ValueError)
