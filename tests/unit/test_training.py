"""The training loop: what it minimizes, what it keeps, and that nothing is lost."""

import json
import math
import os
import random
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from predoc_lib import checkpoint
from predoc_lib.checkpoint import CheckpointError
from predoc_lib.guards import SolverError
from predoc_lib.training import Fitted, TrainingError, fit, warm_up_cosine

GOAL = torch.tensor([1.0, 2.0])


class Point(nn.Module):
    """Two numbers to be trained."""

    def __init__(self, *values):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values or (5.0, -3.0)))

    def forward(self):
        return self.x


class Endless:
    """Samples that are never used up; each is its number."""

    def __getitem__(self, i):
        return float(i)


def quadratic(model, batch, rows):
    return ((model() - GOAL) ** 2 * torch.tensor([1.0, 4.0])).sum()


def train(model, loss=quadratic, *, data=None, optimizer=None, rate=0.1, cosine=True, **options):
    """fit with Adam and its usual schedule."""
    options = {"batch_size": 1, "steps": 20, **options}
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=rate)
    schedule = warm_up_cosine(optimizer, options["steps"]) if cosine and options["steps"] else None
    return fit(model, Endless() if data is None else data, loss, optimizer, schedule=schedule, **options)


def loaded(folder):
    return safetensors.torch.load_file(folder / "weights.safetensors")["x"]


# ---------------------------------------------------------------- what is minimized


def test_a_quadratic_is_minimized(tmp_path):
    model = Point()
    done = train(model, steps=500, evaluate_every=200, folder=tmp_path)
    torch.testing.assert_close(model.x.detach(), GOAL, atol=1e-3, rtol=0)
    assert [row["step"] for row in done.history] == [200, 400, 500]
    assert done.history[-1]["loss"] < 1e-4 < done.history[0]["loss"]
    assert done.seconds > 0
    assert done.is_main
    assert torch.equal(loaded(tmp_path), model.x.detach())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_and_schedule_of_torch_serve(kind):
    def run(by_fit):
        model = Point()
        optimizer = kind(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        if by_fit:
            fit(model, Endless(), quadratic, optimizer, schedule=schedule, steps=10, batch_size=1)
        else:
            for _ in range(10):
                optimizer.zero_grad()
                quadratic(model, None, None).backward()
                optimizer.step()
                schedule.step()
        return model.x

    assert torch.equal(run(True), run(False))


def test_the_learning_rate_warms_up_and_decays_to_zero():
    """With a constant gradient, each of Adam's steps is as long as the learning rate."""
    model, path = Point(0.0), []

    def loss(model, batch, rows):
        path.append(model.x.item())
        return model.x.sum()

    train(model, loss, steps=100)
    lengths = -np.diff([*path, model.x.item()])
    assert lengths[0] == pytest.approx(0.01, rel=0.01)
    assert max(lengths) == pytest.approx(0.1, rel=0.05)
    assert lengths.argmax() < 12
    assert lengths[-1] < 1e-4


def test_a_long_gradient_is_scaled_to_the_limit_a_short_one_is_left_and_the_history_has_its_length():
    for clip, expected in ((0.5, 0.5), (5.0, 2.0), (0.0, 2.0)):
        model = Point(0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        done = fit(model, Endless(), lambda m, b, r: 2 * m.x.sum(), optimizer, steps=1, batch_size=1, clip=clip)
        assert done.history[0]["gradient"] == 2.0
        assert model.x.item() == pytest.approx(-expected, rel=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole():
    data = torch.randn(64, 3, dtype=torch.float64)

    def loss(model, x, rows):
        return ((model(x)[:, 0] - 1 + 0.1 * rows.randn().double()) ** 2).mean()

    weights = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        train(model, loss, data=data, batch_size=8, accumulate=accumulate, steps=30)
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-12, rtol=0)


def test_epochs_are_passes_through_the_data():
    seen = []

    def loss(model, batch, rows):
        seen.extend(batch.tolist())
        return quadratic(model, batch, rows)

    train(Point(), loss, data=torch.arange(12), batch_size=4, steps=None, epochs=2)
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))


def test_the_average_of_the_weights_is_the_closed_forms_and_is_what_remains(tmp_path):
    """Plain descent on x with steps of 1: x is 4, 3, 2, ... after each step."""
    model = Point(5.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []

    def evaluate(m, mine):
        seen.append(m.x.item())
        return {"x": m.x}

    fit(
        model, Endless(), lambda m, b, r: m.x.sum(), optimizer, steps=4, batch_size=1, ema=0.75, folder=tmp_path,
        evaluate=evaluate, evaluate_every=4,
    )  # fmt: skip
    average = 4.0
    for x in (3, 2, 1):
        average = 0.75 * average + 0.25 * x
    assert model.x.item() == pytest.approx(average, rel=1e-6)
    assert seen == pytest.approx([average])
    assert loaded(tmp_path).item() == pytest.approx(average)


def test_only_the_named_networks_run_in_bfloat16_and_afterwards_none_does():
    seen = {}

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.update(within=out.dtype)
            return out

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Sequential(Spy(4, 4)), nn.Linear(4, 4)

        def forward(self, x):
            y = self.inside(x)
            z = self.outside(y)
            seen.update(returned=y.dtype, outside=z.dtype)
            return z

    model = Two()
    loss = lambda m, x, rows: m(x).square().mean()  # noqa: E731
    train(model, loss, data=torch.randn(8, 4), batch_size=2, steps=2, precision="bfloat16", networks=[model.inside])
    assert seen == {"within": torch.bfloat16, "returned": torch.float32, "outside": torch.float32}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model(torch.randn(2, 4))
    assert seen["within"] == torch.float32


@pytest.mark.slow
def test_compiled_networks_learn_the_same():
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        loss = lambda m, x, rows: m(x).square().mean()  # noqa: E731
        train(model, loss, data=torch.randn(8, 4), batch_size=2, steps=5, compile=compiled)
        assert "forward" not in vars(model), "what is measured after training would be compiled anew"
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- the history


def test_figures_in_the_history_are_means_since_the_last_row():
    def loss(model, batch, rows):
        return {"loss": model.x.sum() * 0 + rows.step, "evaluations": 10 * rows.step}

    history = train(Point(), loss, steps=5, evaluate_every=3).history
    assert [(row["loss"], row["evaluations"]) for row in history] == [(2.0, 20.0), (4.5, 45.0)]


def test_evaluation_is_in_evaluation_mode_without_gradients_and_training_goes_on():
    model, modes = Point(), []

    def evaluate(model, mine):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"figure": torch.tensor([6.0, 8.0])[mine], "other": 7.0}

    def loss(model, batch, rows):
        modes.append((model.training, torch.is_grad_enabled()))
        return quadratic(model, batch, rows)

    history = train(model, loss, steps=5, evaluate=evaluate, evaluate_every=2).history
    assert [(row["figure"], row["other"]) for row in history] == [(7.0, 7.0)] * 3
    assert modes == [(True, True)] * 5


def test_seconds_count_training_and_neither_evaluation_nor_checkpoints(monkeypatch, tmp_path):
    now, save = [0.0], checkpoint.save

    def spend(seconds):
        now[0] += seconds
        return {}

    def slow_save(*arguments):
        spend(1000.0)
        return save(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -now[0])  # a clock that goes backwards
    monkeypatch.setattr(checkpoint, "save", slow_save)

    def loss(model, batch, rows):
        spend(1.0)
        return quadratic(model, batch, rows)

    options = {"steps": 5, "evaluate_every": 2, "progress": False, "folder": tmp_path}
    done = train(Point(), loss, evaluate=lambda m, mine: spend(100.0), **options)
    assert done.seconds == 5
    assert [row["seconds"] for row in done.history] == [2, 4, 5]


def test_the_bar_shows_the_loss_and_the_chosen_figure(capsys):
    train(Point(), steps=3, evaluate=lambda m, mine: {"psnr": 12.5}, show="psnr", progress=True)
    assert "psnr=12.5" in capsys.readouterr().err
    train(Point(), steps=3, progress=False)
    assert capsys.readouterr().err == ""


def test_tensorboard_logs_when_asked(tmp_path):
    train(Point(), steps=3, folder=tmp_path / "a")
    assert not list((tmp_path / "a").rglob("*tfevents*"))
    train(Point(), steps=3, folder=tmp_path / "b", tensorboard=True)
    (events,) = (tmp_path / "b").rglob("*tfevents*")
    assert b"loss" in events.read_bytes()


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_weights(tmp_path, bad):
    kept = []

    def loss(model, batch, rows):
        return quadratic(model, batch, rows) * (float(bad) if rows.step == 8 else 1)

    def evaluate(model, mine):
        kept.append(model.x.detach().clone())
        return {}

    with pytest.raises(TrainingError, match=rf"The loss is {bad} at step 8: .*step-00000006.* is kept") as error:
        train(Point(), loss, evaluate=evaluate, evaluate_every=3, folder=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "learning_rate" in str(error.value)
    assert len(kept) == 2
    assert torch.equal(loaded(tmp_path), kept[-1])


def test_a_bad_loss_at_once_says_that_nothing_was_saved(tmp_path):
    with pytest.raises(TrainingError, match=r"at step 1: .*No checkpoint was saved yet"):
        train(Point(), lambda m, b, r: m.x.sum() * float("nan"), folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("where", ["loss", "evaluation"])
@pytest.mark.parametrize("error", [SolverError("The solver stopped."), FloatingPointError("No such Normal.")])
def test_a_model_that_says_itself_that_it_diverged_stops_with_the_step_and_what_is_kept(tmp_path, where, error):
    def loss(model, batch, rows):
        if where == "loss" and rows.step == 6:
            raise error
        loss.step = rows.step
        return quadratic(model, batch, rows)

    def evaluate(model, mine):
        if where == "evaluation" and loss.step == 6:
            raise error
        return {}

    with pytest.raises(TrainingError, match=rf"^{error} Training stopped at step 6\. .*step-00000003.* is kept\. Try"):
        train(Point(), loss, evaluate=evaluate, evaluate_every=3, folder=tmp_path)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    """sqrt(0) is finite, its gradient is not: the step that would follow ruins every weight."""
    model = Point()

    def loss(model, batch, rows):
        zero = (0 * model.x).sum()
        return quadratic(model, batch, rows) + (zero if rows.step < 6 else zero.sqrt())

    with pytest.raises(TrainingError, match="The gradient is nan at step 6"):
        train(model, loss, evaluate_every=3, folder=tmp_path)
    assert torch.isfinite(loaded(tmp_path)).all()
    assert torch.isfinite(model.x).all()


class Broken(Endless):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("the disk is gone")
        return float(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_loaded_are_named_with_the_step_and_the_cause(tmp_path, workers):
    message = r"The data of step 8 cannot be loaded: OSError: .*the disk is gone.*step-0000000\d.* is kept"
    with pytest.raises(TrainingError, match=message):
        train(Point(), data=Broken(), evaluate_every=1, folder=tmp_path, workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "accumulate": 2}, "multiple of processes times accumulate, 1 x 2, got 5"),
        ({"precision": "float16"}, "Unknown precision 'float16'"),
        ({"compile": "reduce_overhead"}, "Unknown mode of compile 'reduce_overhead'. Did you mean 'reduce-overhead'?"),
        ({"steps": None}, "Give steps or epochs"),
        ({"steps": None, "epochs": 1}, "Endless data have no epochs"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(Point(), folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    steps = []
    with pytest.raises(TrainingError, match="Nothing can be kept in"):
        train(Point(), lambda m, b, r: steps.append(1), folder=tmp_path / "file" / "run")
    assert not steps


# ---------------------------------------------------------------- stopping and going on


class Random(nn.Module):
    """Something whose training uses every source of chance."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


class Samples:
    """50 samples."""

    def __init__(self):
        self.x = torch.randn(50, 3, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return 50

    def __getitem__(self, i):
        return self.x[i]


class Stop(Exception):
    """The end of a process."""


def chancy(folder, stop_at=None, workers=0):
    """A run of Random, killed before a step if ``stop_at`` says so; its weights and what fit returned."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = Random()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(model, x, rows):
        if rows.step == stop_at:
            raise Stop
        noise = rows.randn(3) + 0.1 * np.random.rand() + 0.1 * random.random() + 0.1 * torch.rand(1)
        return {"loss": (model.net(x + 0.1 * noise) - x.sum(1, keepdim=True)).square().mean(), "step": rows.step}

    done = fit(
        model, Samples(), loss, optimizer, schedule=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, 23), steps=23,
        batch_size=8, ema=0.9, clip=1.0, workers=workers, evaluate_every=4, folder=folder, seed=3,
        evaluate=lambda m, mine: {"norm": m.net[0].weight.norm()}, identity={"seed": 3},
    )  # fmt: skip
    return {k: v.clone() for k, v in model.state_dict().items()}, done


def without_seconds(done: Fitted):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in done.history]


@pytest.mark.usefixtures("as_shipped")  # the checks of shapes draw from Python's generator
@pytest.mark.parametrize("stops", [(2,), (5,), (8, 9), (13, 14, 22), (23,)], ids=str)
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path, stops):
    """Bit by bit: weights, averages, batch statistics, and the history."""
    undisturbed, done = chancy(None)
    for stop in stops:
        with pytest.raises(Stop):
            chancy(tmp_path, stop)
    resumed, again = chancy(tmp_path)
    assert all(torch.equal(resumed[k], undisturbed[k]) for k in undisturbed)
    assert without_seconds(again) == without_seconds(done)


@pytest.mark.slow
@pytest.mark.usefixtures("as_shipped")
def test_workers_that_load_data_change_nothing(tmp_path):
    undisturbed, _ = chancy(None)
    with pytest.raises(Stop):
        chancy(tmp_path, 10, workers=2)
    resumed, _ = chancy(tmp_path, workers=2)
    assert all(torch.equal(resumed[k], undisturbed[k]) for k in undisturbed)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, done = chancy(tmp_path)
    again, other = chancy(tmp_path, stop_at=1)  # it would stop if it trained
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert other.history == done.history


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    train(Point(), steps=3, folder=tmp_path, identity={"experiment": "a", "steps": 3, "device": "cpu"})
    before = sorted(tmp_path.rglob("*"))
    train(Point(), steps=3, folder=tmp_path, identity={"experiment": "a", "steps": 3, "device": "cuda"})
    with pytest.raises(CheckpointError, match="experiment is 'a' there and 'b' here; steps is 3 there and 4 here"):
        train(Point(), steps=4, folder=tmp_path, identity={"experiment": "b", "steps": 4, "device": "cpu"})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("as_shipped")
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    undisturbed, _ = chancy(None)
    with pytest.raises(Stop):
        chancy(tmp_path, 14)
    newest = checkpoint.paths(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="The checkpoint before it is used"):
        resumed, _ = chancy(tmp_path)
    assert all(torch.equal(resumed[k], undisturbed[k]) for k in undisturbed)


def test_only_the_last_two_checkpoints_are_kept_and_they_can_be_read_without_this_library(tmp_path):
    chancy(tmp_path)
    found = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step-00000020.safetensors", "step-00000023.safetensors"]
    with safetensors.safe_open(found[-1], framework="pt") as file:
        assert json.loads(file.metadata()["state"])
        assert any(name.startswith("/optimizer/state") for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("when", ["step", "evaluation", "save"])
@pytest.mark.parametrize(("number", "left_by"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_the_last_step_leaves_when_all_of_the_run_is_kept(
    tmp_path, monkeypatch, capsys, when, number, left_by
):
    """Wherever in it: nothing is left to do but to read what is there."""
    save = checkpoint.save

    def arrives(here, step):
        if here == when and step == 6:
            os.kill(os.getpid(), number)
        return {}

    def loss(model, batch, rows):
        arrives("step", rows.step)
        steps.append(rows.step)
        return quadratic(model, batch, rows)

    def saving(folder, step, state):
        arrives("save", step)
        return save(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", saving)
    steps, evaluate = [], lambda m, mine: arrives("evaluation", len(steps))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    model, again = Point(), Point()
    with pytest.raises(left_by) as stop:
        train(model, loss, steps=6, evaluate_every=3, evaluate=evaluate, folder=tmp_path)
    assert number != signal.SIGTERM or stop.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"Stopped by {number.name} after step 6" in capsys.readouterr().err
    done = train(again, loss, steps=6, evaluate_every=3, folder=tmp_path)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in done.history] == [3, 6]
    assert torch.equal(again.x, model.x)
    assert torch.equal(loaded(tmp_path), model.x.detach())


def test_a_checkpoint_is_written_after_the_weights_that_it_stands_for(tmp_path, monkeypatch):
    """Else a run that is killed in between would be taken for finished, with the weights of an earlier step."""
    save, on_disk = checkpoint.save, []

    def killed(folder, step, state):
        on_disk.append((loaded(tmp_path), state["average"]["module.x"].clone()))
        if step == 6:
            raise Stop
        return save(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Stop):
        train(Point(), steps=6, evaluate_every=3, ema=0.5, folder=tmp_path)
    assert len(on_disk) == 2
    assert all(torch.equal(weights, wanted) for weights, wanted in on_disk)
    assert not torch.equal(on_disk[0][0], on_disk[1][0])


def test_training_needs_no_main_thread():
    """Where signals cannot be caught, they are left alone."""
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(train(Point(), steps=3, progress=False)))
    thread.start()
    thread.join()
    assert math.isfinite(found[0].history[-1]["loss"])
