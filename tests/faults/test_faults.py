"""Everything that may happen to a run on its way: it is killed, its disk is full, its peers die. Nothing may be lost.

Each test prints what its user would have read; ``pytest -rP tests/faults`` shows it.
"""

import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from processes import (
    SCRIPT,
    TORCHRUN,
    Forked,
    history,
    interpreter,
    last_line,
    mount,
    outcome,
    pair,
    run,
    same,
    small_disk,
    steps_done,
    wait_for,
    weights,
)  # fmt: skip

from predoc_lib import checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights and the figures of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, out, error = run(folder)
    assert code == 0, error
    return weights(folder), figures(out)


def figures(out):
    """Losses and errors."""
    return [[float(x) for x in line.split()[1:]] for line in out.splitlines()]


def apart(a, b):
    """The largest relative difference."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def killed_after(folder, step, *options):
    """A run that was killed when its checkpoint of this step was there."""
    process = Forked(folder, "pause=0.02", *options)
    wait_for(folder, step, process)
    process.kill()
    process.wait()


# ---------------------------------------------------------------- killed


def kill_at_change(folder, n):
    """In a child: it ends by SIGKILL just before it changes the files in its folder for the n-th time."""
    left = itertools.count(n, -1)

    def watch(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(arguments[0]).startswith(f"{folder}/"):
            next(left) > 1 or os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(watch)


def half_a_save(folder):
    return [*folder.glob("checkpoints/.step-*"), *folder.glob(".weights.*")]


def attempt(folder, rng):
    """Go on with the run, and kill it at a random moment of its training or of a save; whether that came to pass."""
    options = (folder, "every=1", "steps=60")
    if rng.random() < 0.5:
        child = Forked(*options, first=kill_at_change(folder, rng.randint(1, 40)))
    else:
        before, child = steps_done(folder), Forked(*options)
        while rng.random() < 0.8 and steps_done(folder) == before and child.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        child.kill()
    code = child.wait()
    assert code in (0, -signal.SIGKILL), child.communicate()
    return code != 0


@pytest.mark.slow
def test_fifty_kills_and_fifty_resumes_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    whole, rng, kills, torn, rounds = tmp_path / "whole", random.Random(0), 0, 0, 0
    assert run(whole, "every=1", "steps=60")[0] == 0
    while kills < 50:
        folder, rounds = tmp_path / f"round-{rounds}", rounds + 1
        while kills < 50 and attempt(folder, rng):
            kills, torn = kills + 1, torn + bool(half_a_save(folder))
        assert run(folder, "every=1", "steps=60")[0] == 0
        assert same(weights(folder), weights(whole))
        assert history(folder) == history(whole)
        assert not half_a_save(folder)
    print(
        f"{kills} kills and {kills} resumes in {rounds} runs, {torn} of them with half a save on the disk: "
        "all weights and histories equal"
    )
    assert torn > 5


@pytest.mark.slow
def test_kill_9_of_a_fresh_process_loses_nothing(tmp_path, undisturbed):
    rng, reached = random.Random(0), []
    for _ in range(5):
        process = interpreter(SCRIPT, tmp_path, "pause=0.05")
        wait_for(tmp_path, steps_done(tmp_path) + 2, process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        reached.append(steps_done(tmp_path))
    assert reached[-1] < 40
    assert run(tmp_path)[0] == 0
    print(f"killed after steps {reached}")
    assert same(weights(tmp_path), undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_says_so_and_leaves(tmp_path, undisturbed, number, workers):
    """Ctrl-C in a terminal goes to every process of the group: to those that load data, too."""
    process = interpreter(SCRIPT, tmp_path, "pause=0.05", "every=7", f"workers={workers}", start_new_session=True)
    wait_for(tmp_path, 7, process)
    os.killpg(process.pid, number)
    code, _, error = outcome(process)
    assert code in ((143,) if number == signal.SIGTERM else (-signal.SIGINT, 1, 130))  # of Ctrl-C: as Python has it
    (line,) = [line for line in error.splitlines() if line.startswith("Stopped")]
    print(line)
    step = int(re.search(r"after step (\d+)", line)[1])
    assert line == f"Stopped by {number.name} after step {step}: start the run in {tmp_path} again to go on."
    assert steps_done(tmp_path) == step
    assert run(tmp_path, "every=7")[0] == 0
    assert same(weights(tmp_path), undisturbed[0])


def test_the_first_ctrl_c_waits_for_the_step_and_the_second_leaves_at_once(tmp_path):
    process = interpreter(SCRIPT, tmp_path, "pause=60.0")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, _, error = outcome(process)
    print(error.splitlines()[-1])
    assert code != 0
    assert error.splitlines()[-1] == "KeyboardInterrupt"
    assert time.monotonic() - began < 30


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, undisturbed):
    def backwards():
        hours = itertools.count(0, -3600)
        time.time = lambda: 1e9 + next(hours)

    killed_after(tmp_path, 8)
    *_, older, newer = checkpoint.paths(tmp_path / "checkpoints")  # and one more, if killed before it was deleted
    os.utime(older, (2e9, 2e9))
    os.utime(newer, (1, 1))
    assert run(tmp_path, "log=1", first=backwards)[0] == 0
    rows = checkpoint.newest(tmp_path / "checkpoints")["history"]
    seconds = [row["seconds"] for row in rows]
    print(f"went on from {newer.name}; seconds in the history: {seconds[0]} to {seconds[-1]}, never less")
    seen = json.loads(tmp_path.with_name("log-0").read_text())["seen"]
    assert len(seen) == 8 * (40 - int(newer.stem[5:]))
    assert seconds[0] >= 0
    assert seconds == sorted(seconds)
    assert same(weights(tmp_path), undisturbed[0])


# ---------------------------------------------------------------- disks and folders


def test_a_disk_that_takes_no_more_costs_nothing_that_was_saved(tmp_path, undisturbed):
    killed_after(tmp_path, 4)
    before = steps_done(tmp_path)
    code, _, error = run(tmp_path, first=small_disk(2000))
    sentence = last_line(error)
    assert code == 1
    assert re.search(
        r"TrainingError: The checkpoint of step \d+ cannot be saved in .*File too large.*is kept", sentence
    )
    assert steps_done(tmp_path) == before
    assert not half_a_save(tmp_path)
    assert run(tmp_path)[0] == 0
    assert same(weights(tmp_path), undisturbed[0])


@pytest.mark.parametrize("room", [1_000, 30_000, 60_000])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, undisturbed, room):
    """With room for nothing, for a part of a checkpoint, and for a checkpoint or two."""
    mount(tmp_path, "-o", "size=300k")
    try:
        folder = tmp_path / "run"
        (tmp_path / "ballast").write_bytes(bytes(300 * 1024 - room - 8192))
        code, _, error = run(folder)
        sentence = last_line(error)
        assert code == 1
        assert "No space left on device" in sentence
        assert "Make room, and start the run again." in sentence
        kept = steps_done(folder)
        assert ("No checkpoint was saved yet" in sentence) if kept == 0 else (f"{kept:08d}" in sentence)
        assert not half_a_save(folder)
        (tmp_path / "ballast").unlink()
        code, _, error = run(folder)
        assert code == 0, error
        assert same(weights(folder), undisturbed[0])
    finally:
        subprocess.run(["umount", tmp_path], check=False)


def test_a_file_system_that_turns_read_only_costs_nothing_that_was_saved(tmp_path, undisturbed):
    mount(tmp_path)
    try:
        killed_after(tmp_path / "run", 4)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        code, _, error = run(tmp_path / "run")
        sentence = last_line(error)
        assert code == 1
        assert re.search(r"TrainingError: .* cannot be saved in .*Read-only file system.* is kept", sentence)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        subprocess.run(["mount", "-o", "remount,rw", tmp_path], check=True)
        assert run(tmp_path / "run")[0] == 0
        assert same(weights(tmp_path / "run"), undisturbed[0])
    finally:
        subprocess.run(["umount", tmp_path], check=False)


def test_a_folder_below_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, out, error = run(tmp_path / "file" / "run")
    assert code == 1
    assert re.search(r"TrainingError: Nothing can be kept in .*: Not a directory", last_line(error))
    assert out == ""


def test_a_read_only_folder_is_refused_before_training():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # root may write everywhere, and its own folders are closed to others
    try:
        folder.chmod(0o555)
        code, out, error = run(folder / "run", first=lambda: os.geteuid() or os.setuid(65534))
        assert code == 1
        assert re.search(r"TrainingError: Nothing can be kept in .*: Permission denied", last_line(error))
        assert out == ""
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- files that are not what they seem


@pytest.mark.parametrize("left", [-1000, 100, 0])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, undisturbed, left):
    killed_after(tmp_path, 8)
    newest = checkpoint.paths(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:left])
    code, _, error = run(tmp_path)
    (warning,) = [line for line in error.splitlines() if "UserWarning" in line]
    print(warning)
    assert code == 0
    assert newest.name in warning
    assert "The checkpoint before it is used." in warning
    assert same(weights(tmp_path), undisturbed[0])


def test_the_checkpoints_of_another_experiment_are_refused(tmp_path):
    assert run(tmp_path, "steps=4")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    code, _, error = run(tmp_path, "steps=4", "seed=1")
    assert code == 1
    assert "holds another run: seed is 0 there and 1 here" in last_line(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


class Evil:
    """What a pickle does when it is opened."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_checkpoint_that_is_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-00000004.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Evil(tmp_path / "harm")))
    code, _, error = run(tmp_path / "run")
    assert code == 1
    assert "Every checkpoint in" in last_line(error)
    assert not (tmp_path / "harm").exists()
    pickle.loads(path.read_bytes())  # it would have
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_stop_the_run_with_step_and_cause(tmp_path, undisturbed, workers):
    code, _, error = run(tmp_path, "broken=11", f"workers={workers}")
    sentence = last_line(error)
    assert code == 1
    step = int(re.search(r"The data of step (\d+) cannot be loaded: OSError: .*sector 7 cannot be read", sentence)[1])
    assert f"step-{(step - 1) // 2 * 2:08d}.safetensors is kept." in sentence
    assert run(tmp_path)[0] == 0  # when the disk is mended
    assert same(weights(tmp_path), undisturbed[0])


# ---------------------------------------------------------------- many processes


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path, undisturbed):
    code, out, error = outcome(interpreter(*TORCHRUN, 2, SCRIPT, tmp_path / "run"))
    assert code == 0, error
    losses, errors = map(apart, undisturbed[1], figures(out))
    print(f"20 losses of two processes differ from those of one by at most {losses:.1e}, validation by {errors:.1e}")
    assert losses < 1e-5
    assert errors < 1e-5
    for key, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, undisturbed[0][key], atol=1e-5, rtol=0)


def test_of_two_processes_one_writes_both_read_each_sample_once_an_epoch_and_draw_other_numbers(tmp_path):
    for process in pair(tmp_path / "run", "log=1", "steps=24"):
        code, _, error = outcome(process)
        assert code == 0, error
    logs = [json.loads((tmp_path / f"log-{rank}").read_text()) for rank in range(2)]
    for epoch in range(3):
        mine, others = (log["seen"][32 * epoch : 32 * (epoch + 1)] for log in logs)
        assert sorted(mine + others) == list(range(64))
    assert logs[0]["touched"].count("os.rename") == 2 * 12  # weights and checkpoints
    assert logs[1]["touched"] == []
    assert logs[0]["random"] != logs[1]["random"]


def test_a_run_of_two_processes_goes_on_with_one_and_back(tmp_path, undisturbed):
    two = pair(tmp_path, "pause=0.02")
    wait_for(tmp_path, 10, two[0])
    for process in two:
        process.send_signal(signal.SIGTERM)
    (code, _, error), (other_code, _, silence) = map(outcome, two)
    assert f"start the run in {tmp_path} again to go on" in last_line(error)
    assert (code, other_code) == (143, 143)
    assert "Stopped" not in silence
    killed_after(tmp_path, 20)
    (code, out, error), (other_code, _, _) = map(outcome, pair(tmp_path))
    assert code == other_code == 0, error
    losses, errors = map(apart, undisturbed[1], figures(out))
    print(f"2, then 1, then 2 processes: losses differ by at most {losses:.1e}, validation by {errors:.1e}")
    assert losses < 1e-5
    assert errors < 1e-5


@pytest.mark.slow
def test_when_one_process_dies_torchrun_stops_the_other_within_a_minute_and_says_why(tmp_path):
    began = time.monotonic()
    code, _, error = outcome(interpreter(*TORCHRUN, 2, SCRIPT, tmp_path, "dies_at=9"))
    took = time.monotonic() - began
    said = [line for line in error.splitlines() if "Another process of this run is gone" in line or "exitcode" in line]
    print(f"after {took:.0f} s:", *said, sep="\n")
    assert code != 0
    assert took < 60
    assert any("exitcode  : 7" in line for line in said)
    assert steps_done(tmp_path) == 8


@pytest.mark.parametrize("number", [0, int(signal.SIGKILL)])
def test_when_one_process_dies_the_other_stops_within_a_minute_and_says_why(tmp_path, undisturbed, number):
    """Without a launcher that would stop it, as on another machine."""
    began = time.monotonic()
    survivor, dead = pair(tmp_path, "dies_at=9", f"number={number}")
    assert dead.wait() == (-number if number else 7)
    code, _, error = outcome(survivor)
    sentence = last_line(error)
    assert code == 1
    assert time.monotonic() - began < 60
    assert "TrainingError: Another process of this run is gone, so this one stops too. The checkpoint" in sentence
    assert "step-00000008.safetensors is kept." in sentence
    for code, _, error in map(outcome, pair(tmp_path)):
        assert code == 0, error
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, undisturbed[0][key], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_latent_ode_has_the_same_curve_on_two_processes(tmp_path):
    """At a learning rate that does not amplify rounding: at the default the first steps do, 30-fold and more a step."""
    options = "--preset=smoke", "--device=cpu", "--evaluate-every=1", "--learning-rate=1e-5", "--n-test=4"
    curves = []
    for launcher in ((), (*TORCHRUN, "2")):
        folder = tmp_path / str(len(curves))
        command = (*launcher, "-m", "predoc_lib.experiments.latent_ode", *options, "--folder", folder)
        code, _, error = outcome(interpreter(*command))
        assert code == 0, error
        curves.append([row["loss"] for row in checkpoint.newest(folder / "checkpoints")["history"]])
    print(f"{len(curves[0])} losses differ by at most {apart(*curves):.1e}, relative")
    assert len(curves[0]) == 40
    assert apart(*curves) < 1e-5
