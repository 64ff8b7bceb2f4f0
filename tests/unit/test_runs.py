"""Run folders: one process at a time, one run a folder, and a state that no crash can falsify."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from predoc_lib import checkpoint, results, runs
from predoc_lib.checkpoint import CheckpointError
from predoc_lib.runs import RunError, claim, state


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 10
    device: str = "auto"


def record():
    return results.record(
        "toy", Config(), {"error": 0.5}, device=torch.device("cpu"), wall_time_s=1.0, evaluations=3,
        data={"name": "none", "sha256": "0" * 64}, history=[],
    )  # fmt: skip


def hold(folder, ready, end=None):
    """Work in a folder until killed, or until told to end."""
    with claim(folder, "toy", Config()):
        ready.set()
        end.wait() if end is not None else time.sleep(60)


def elsewhere(folder, *, ends=False):
    """A process that works in the folder."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event() if ends else None
    process = context.Process(target=hold, args=(folder, ready, end))
    process.start()
    assert ready.wait(10)
    return process, end


def test_a_run_is_running_exactly_as_long_as_its_process_works_in_it(tmp_path):
    process, end = elsewhere(tmp_path, ends=True)
    assert state(tmp_path) == "running"
    end.set()
    process.join()
    assert state(tmp_path) == "killed"


def test_after_kill_9_a_run_is_killed_and_its_folder_is_free(tmp_path):
    process, _ = elsewhere(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert state(tmp_path) == "killed"
    with claim(tmp_path, "toy", Config()):
        assert state(tmp_path) == "running"


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    process, end = elsewhere(tmp_path, ends=True)
    with pytest.raises(RunError, match="is being trained in by another process"), claim(tmp_path, "toy", Config()):
        pytest.fail("it was let in")
    assert json.loads((tmp_path / "run.json").read_text())["error"] is None
    end.set()
    process.join()


def test_an_error_is_noted_and_going_on_clears_it(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path, "toy", Config()):
        1 / 0  # noqa: B018
    assert state(tmp_path) == "failed"
    assert json.loads((tmp_path / "run.json").read_text())["error"] == "ZeroDivisionError: division by zero"
    with claim(tmp_path, "toy", Config()):
        results.save(tmp_path, record())
    assert state(tmp_path) == "finished"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_was_stopped_has_not_failed(tmp_path, stop):
    with pytest.raises(stop), claim(tmp_path, "toy", Config()):
        raise stop
    assert state(tmp_path) == "killed"


def test_another_run_in_the_folder_is_refused_with_every_field_that_differs(tmp_path):
    with claim(tmp_path, "toy", Config()):
        pass
    before = (tmp_path / "run.json").read_text()
    for experiment, config, message in (
        (
            "toy",
            Config(seed=1, steps=20),
            "seed is 0 there and 1 here; steps is 10 there and 20 here. Use another folder",
        ),
        ("other", Config(), "experiment is 'toy' there and 'other' here"),
    ):
        with pytest.raises(CheckpointError, match=message), claim(tmp_path, experiment, config):
            pytest.fail("it was let in")
    assert (tmp_path / "run.json").read_text() == before


def test_a_run_may_go_on_on_another_device(tmp_path):
    with claim(tmp_path, "toy", Config()):
        started = json.loads((tmp_path / "run.json").read_text())["started"]
    with claim(tmp_path, "toy", Config(device="cpu")):
        assert json.loads((tmp_path / "run.json").read_text())["started"] == started


@pytest.mark.parametrize("content", ["", "{", "[]", '{"experiment": 3, "config": {}}', '{"config": {}}'])
def test_a_damaged_note_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json is damaged"), claim(tmp_path, "toy", Config()):
        pytest.fail("it was let in")


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside = tmp_path / "file" / "run"
    with pytest.raises(RunError, match=r"Nothing can be written in .*Choose another"), claim(inside, "toy", Config()):
        pytest.fail("it was let in")


def test_the_listing_shows_the_checkpoint_of_the_highest_step_whatever_the_clock_says(tmp_path):
    for name in ("b", "a"):
        with claim(tmp_path / "toy" / name, "toy", Config()):
            pass
    folder = tmp_path / "toy" / "a" / "checkpoints"
    for step in (5, 10):
        checkpoint.save(folder, step, {"step": step, "steps": 20, "history": [{"step": step, "loss": 1 / step}]})
    os.utime(folder / "step-00000010.safetensors", (0, 0))
    first, second = runs.listing(tmp_path)
    assert (first["name"], first["state"], first["step"], first["steps"]) == ("a", "killed", 10, 20)
    assert first["row"]["loss"] == 0.1
    assert (second["name"], second["step"]) == ("b", 0)


def test_the_listing_names_damage_and_goes_on(tmp_path):
    for name in ("a", "b", "c"):
        with claim(tmp_path / name, "toy", Config()):
            pass
    (tmp_path / "a" / "run.json").write_text("{")
    (tmp_path / "b" / "checkpoints").mkdir()
    (tmp_path / "b" / "checkpoints" / "step-00000001.safetensors").write_bytes(b"nonsense")
    a, b, c = runs.listing(tmp_path)
    assert "run.json is damaged" in a["row"]["problem"]
    assert "cannot be read as a checkpoint" in b["row"]["problem"]
    assert c["state"] == "killed"


def test_the_parameters_of_a_run_are_read_back(tmp_path):
    with claim(tmp_path, "toy", Config(seed=4)):
        pass
    assert runs.config_of(tmp_path) == ("toy", dataclasses.asdict(Config(seed=4)))
    with pytest.raises(RunError, match=r"holds no run: there is no run\.json"):
        runs.config_of(Path(tmp_path) / "nowhere")


def test_the_processes_of_a_run_are_those_of_its_last_start(tmp_path):
    assert runs.processes_of(tmp_path) == 1
    for n in (4, 2):
        with claim(tmp_path, "toy", Config(), n):
            pass
        assert runs.processes_of(tmp_path) == n
    for note in ({}, {"num_processes": "many"}, {"num_processes": 0}):
        (tmp_path / "run.json").write_text(json.dumps({"experiment": "toy", "config": {}} | note))
        assert runs.processes_of(tmp_path) == 1


def disk_is_full(folder, note):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_refused_in_one_sentence_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_write", disk_is_full)
    with pytest.raises(RunError, match=r"^Nothing can be written in .*: No space left on device\."):  # noqa: SIM117
        with claim(tmp_path, "toy", Config()):
            pytest.fail("it was let in")


def test_a_disk_that_is_full_later_does_not_hide_what_went_wrong(tmp_path, monkeypatch):
    def train():
        monkeypatch.setattr(runs, "_write", disk_is_full)
        raise RuntimeError("the checkpoint cannot be saved")

    with pytest.raises(RuntimeError, match="the checkpoint cannot be saved"), claim(tmp_path, "toy", Config()):
        train()


def test_one_that_looks_is_not_taken_for_a_run_and_keeps_none_out(tmp_path):
    with claim(tmp_path, "toy", Config()):
        pass
    looking = (tmp_path / ".lock").open("r")
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert state(tmp_path) == "killed"
    threading.Timer(0.1, looking.close).start()
    with claim(tmp_path, "toy", Config()):
        assert state(tmp_path) == "running"


def test_what_a_run_is_made_of_is_compared_under_its_lock(tmp_path, monkeypatch):
    read = runs._read
    held = []
    monkeypatch.setattr(runs, "_read", lambda folder: held.append(runs._is_locked(folder)) or read(folder))
    with claim(tmp_path, "toy", Config()):
        pass
    assert held == [True]


OTHER = "cannot be read as a checkpoint: its header holds no state of a run."
LACKING = "is a checkpoint without a run's step and history."


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", OTHER),
        ("[]", OTHER),
        ("3", OTHER),
        ('{"$items": []}', LACKING),
        ('{"$items": [["step", 3], ["steps", 4], ["history", [1]]]}', LACKING),
        ('{"$items": [["step", 3], ["steps", 4], ["history", 5]]}', LACKING),
    ],
)
def test_a_checkpoint_of_something_else_does_not_end_the_listing(tmp_path, content, problem):
    with claim(tmp_path / "a", "toy", Config()):
        pass
    (tmp_path / "a" / "checkpoints").mkdir()
    path = tmp_path / "a" / "checkpoints" / "step-00000001.safetensors"
    safetensors.torch.save_file({}, path, metadata={"state": content})
    (row,) = runs.listing(tmp_path)
    assert row["state"] == "killed"
    assert row["row"] == {"problem": f"{path} {problem}"}
