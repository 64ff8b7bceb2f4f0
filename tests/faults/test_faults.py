"""Everything that may happen to a run on its way: it is killed, its disk is full, its peers die. Nothing may be lost.

Each test prints what its user would have read; ``pytest -rP tests/faults`` shows it.
"""

import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import a_fit
import pytest
import safetensors.torch
import torch

from predoc_lib import checkpoint

SCRIPT = Path(__file__).with_name("a_fit.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


def weights(folder):
    return safetensors.torch.load_file(folder / "weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(*arguments, **options):
    """The script in a fresh interpreter."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT, **options,
    )  # fmt: skip


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def steps_done(folder):
    found = checkpoint.paths(folder / "checkpoints")
    return int(found[-1].stem[5:]) if found else 0


def wait_for(folder, step, process=None):
    for _ in range(600):
        if steps_done(folder) >= step:
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights and the losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, out, error = run(SCRIPT, folder)
    assert code == 0, error
    return weights(folder), [float(x) for x in out.splitlines()[0].split()[1:]]


def forked(folder, **options):
    """A child of this process that trains: it starts at once, since all is imported already."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        a_fit.train(folder, **options)
        code = 0
    finally:
        os._exit(code)


# ---------------------------------------------------------------- killed


def attempts(folder, kills):
    """Start the run and kill it, again and again, at random moments, the middle of a save among them."""
    rng, killed, torn = random.Random(0), 0, 0
    while killed < kills:
        child = forked(folder, every=1, steps=60)
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was faster: begin a new round
            assert os.WEXITSTATUS(status) == 0
            return killed, torn
        killed += 1
        torn += bool(list((folder / "checkpoints").glob(".step-*")) + list(folder.glob(".weights*")))
    return killed, torn


@pytest.mark.slow
def test_fifty_kills_and_fifty_resumes_end_with_the_weights_of_an_undisturbed_run(tmp_path):
    whole = forked(tmp_path / "whole", every=1, steps=60)
    assert os.waitpid(whole, 0)[1] == 0
    expected, kills, torn, rounds = weights(tmp_path / "whole"), 0, 0, 0
    while kills < 50:
        folder = tmp_path / f"round-{rounds}"
        some, half = attempts(folder, 50 - kills)
        last = forked(folder, every=1, steps=60)
        assert os.waitpid(last, 0)[1] == 0
        assert same(weights(folder), expected)
        kills, torn, rounds = kills + some, torn + half, rounds + 1
    print(f"{kills} kills, {kills} resumes in {rounds} runs, {torn} of them in the middle of a save: all weights equal")
    assert kills == 50


@pytest.mark.slow
def test_kill_9_of_a_fresh_process_loses_nothing(tmp_path, undisturbed):
    for step in (3, 20):
        process = start(SCRIPT, tmp_path, "pause=0.02")
        wait_for(tmp_path, step, process)
        process.kill()
        process.communicate()
        assert steps_done(tmp_path) < 40
    assert run(SCRIPT, tmp_path)[0] == 0
    assert same(weights(tmp_path), undisturbed[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, (-signal.SIGINT, 1, 130)), (signal.SIGTERM, (143,))])
def test_a_signal_saves_says_so_and_leaves(tmp_path, undisturbed, number, code):
    process = start(SCRIPT, tmp_path, "pause=0.05", "every=7")
    wait_for(tmp_path, 7, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode in code  # of Ctrl-C: as the shell that started it has it
    (line,) = [line for line in error.splitlines() if line.startswith("Stopped")]
    print(line)
    step = int(re.search(r"after step (\d+)", line)[1])
    assert line == f"Stopped by {number.name} after step {step}: start the run in {tmp_path} again to go on."
    assert steps_done(tmp_path) == step
    assert run(SCRIPT, tmp_path, "every=7")[0] == 0
    assert same(weights(tmp_path), undisturbed[0])


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    process = start(SCRIPT, tmp_path, "pause=60.0")
    time.sleep(0.1)
    while "a_fit" not in Path(f"/proc/{process.pid}/cmdline").read_text():
        time.sleep(0.1)
    time.sleep(15)  # inside the first step's long loss by now
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert time.monotonic() - began < 30


# ---------------------------------------------------------------- disks and folders


def small_disk(limit):
    """In a child: no file may grow beyond ``limit`` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_disk_that_takes_no_more_costs_nothing_that_was_saved(tmp_path, undisturbed):
    process = start(SCRIPT, tmp_path, "pause=0.02")
    wait_for(tmp_path, 4, process)
    process.kill()
    process.communicate()
    before = steps_done(tmp_path)
    code, _, error = run(SCRIPT, tmp_path, preexec_fn=small_disk(2000))
    sentence = error.strip().splitlines()[-1]
    print(sentence)
    assert code == 1
    assert re.search(
        r"TrainingError: The checkpoint of step \d+ cannot be saved in .*File too large.*is kept", sentence
    )
    assert steps_done(tmp_path) == before
    assert not list(tmp_path.rglob(".step*"))
    assert run(SCRIPT, tmp_path)[0] == 0
    assert same(weights(tmp_path), undisturbed[0])


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, undisturbed):
    """A file system of 200 KB, most of which is taken."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        folder = disk / "run"
        (disk / "ballast").write_bytes(bytes(140_000))
        code, _, error = run(SCRIPT, folder)
        sentence = error.strip().splitlines()[-1]
        print(sentence)
        assert code == 1
        assert "No space left on device" in sentence
        assert "Make room, and start the run again." in sentence
        (disk / "ballast").unlink()
        code, _, error = run(SCRIPT, folder)
        assert code == 0, error
        assert same(weights(folder), undisturbed[0])
    finally:
        subprocess.run(["umount", disk], check=False)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, out, error = run(SCRIPT, tmp_path / "file" / "run")
    sentence = error.strip().splitlines()[-1]
    print(sentence)
    assert code == 1
    assert re.search(r"TrainingError: Nothing can be kept in .*: Not a directory", sentence)
    assert out == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o555)
    code, out, error = run(SCRIPT, tmp_path / "run")
    assert code == 1
    assert "Permission denied" in error.splitlines()[-1]
    assert out == ""


# ---------------------------------------------------------------- files that are not what they seem


def test_a_truncated_checkpoint_is_passed_over(tmp_path, undisturbed):
    process = start(SCRIPT, tmp_path, "pause=0.02")
    wait_for(tmp_path, 8, process)
    process.kill()
    process.communicate()
    newest = checkpoint.paths(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    code, _, error = run(SCRIPT, tmp_path)
    (warning,) = [line for line in error.splitlines() if "UserWarning" in line]
    print(warning)
    assert code == 0
    assert newest.name in warning
    assert same(weights(tmp_path), undisturbed[0])


def test_the_checkpoints_of_another_experiment_are_refused(tmp_path):
    assert run(SCRIPT, tmp_path, "steps=4")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    code, _, error = run(SCRIPT, tmp_path, "steps=4", "seed=1")
    print(error.strip().splitlines()[-1])
    assert code == 1
    assert "holds another run: seed is 0 there and 1 here" in error.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {os.environ['PREDOC_HARM']}",))


def test_a_checkpoint_that_is_a_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDOC_HARM", str(tmp_path / "harm"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000004.safetensors").write_bytes(pickle.dumps(Evil()))
    code, _, error = run(SCRIPT, tmp_path)
    print(error.strip().splitlines()[-1])
    assert code == 1
    assert "Every checkpoint in" in error.splitlines()[-1]
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_stop_the_run_with_step_and_cause(tmp_path, workers):
    code, _, error = run(SCRIPT, tmp_path, "broken=11", f"workers={workers}")
    sentence = error.strip().splitlines()[-1]
    print(sentence)
    assert code == 1
    assert re.search(
        r"TrainingError: The data of step \d+ cannot be loaded: OSError: .*sector 7 cannot be read", sentence
    )


# ---------------------------------------------------------------- many processes


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path, undisturbed):
    code, out, error = run(*TORCHRUN, 2, SCRIPT, tmp_path)
    assert code == 0, error
    two = [float(x) for x in out.splitlines()[0].split()[1:]]
    apart = max(abs(a - b) / abs(a) for a, b in zip(undisturbed[1], two, strict=True))
    print(f"{len(two)} losses of two processes differ from those of one by at most {apart:.1e}, relative")
    assert apart < 1e-5
    for key, value in weights(tmp_path).items():
        torch.testing.assert_close(value, undisturbed[0][key], atol=1e-4, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "weights.safetensors"]  # one process wrote


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one_and_back(tmp_path, undisturbed):
    process = start(*TORCHRUN, 2, SCRIPT, tmp_path, "pause=0.02")
    wait_for(tmp_path, 10, process)
    process.terminate()  # torchrun hands it on
    _, error = process.communicate(timeout=60)
    assert f"start the run in {tmp_path} again to go on" in error
    one = start(SCRIPT, tmp_path, "pause=0.02")
    wait_for(tmp_path, 20, one)
    one.kill()
    one.communicate()
    code, out, error = run(*TORCHRUN, 2, SCRIPT, tmp_path)
    assert code == 0, error
    losses = [float(x) for x in out.splitlines()[0].split()[1:]]
    assert max(abs(a - b) / abs(a) for a, b in zip(undisturbed[1], losses, strict=True)) < 1e-4


@pytest.mark.slow
def test_when_one_process_dies_the_other_stops_within_a_minute_and_says_why(tmp_path):
    began = time.monotonic()
    code, _, error = run(*TORCHRUN, 2, SCRIPT, tmp_path, "dies_at=9")
    took = time.monotonic() - began
    said = [
        line for line in error.splitlines() if "Another process of this run is gone" in line or "exitcode  : 7" in line
    ]
    print(f"after {took:.0f} s:", *said, sep="\n")
    assert code != 0
    assert took < 60
    assert said
    assert steps_done(tmp_path) == 8


@pytest.mark.slow
def test_the_latent_ode_has_the_same_curve_on_two_processes(tmp_path):
    """At a learning rate that does not amplify rounding: at the default the first steps do, 30-fold and more a step."""
    options = [
        "--preset",
        "smoke",
        "--device",
        "cpu",
        "--steps",
        "20",
        "--evaluate-every",
        "1",
        "--learning-rate",
        "1e-5",
        "--n-test",
        "4",
    ]
    curves = []
    for launcher in ((), (*TORCHRUN, "2")):
        folder = tmp_path / str(len(curves))
        code, _, error = run(*launcher, "-m", "predoc_lib.experiments.latent_ode", *options, "--folder", folder)
        assert code == 0, error
        curves.append([row["loss"] for row in checkpoint.newest(folder / "checkpoints")["history"]])
    apart = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
    print(f"{len(curves[0])} losses differ by at most {apart:.1e}, relative")
    assert apart < 1e-5
