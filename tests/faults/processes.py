"""How the fault tests start ``a_fit.py``: in a fork of this process, at once, or in an interpreter of its own."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import a_fit
import accelerate
import pytest
import safetensors.torch
import torch

from predoc_lib import checkpoint

SCRIPT = Path(__file__).with_name("a_fit.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
    "--nproc-per-node",
)


class Forked:
    """``a_fit.py`` in a fork of this process, where all is imported already. It is used as a ``subprocess.Popen``."""

    ready = False

    def __init__(self, *arguments, first=None, environment=None):
        if not Forked.ready:
            a_fit.train(None, steps=1)  # PyTorch imports much of itself only now
            Forked.ready = True
        pipes = [os.pipe() for _ in range(2)]
        self.returncode, self.pid = None, os.fork()
        if self.pid:
            for _, end in pipes:
                os.close(end)
            self.outputs = [os.fdopen(end) for end, _ in pipes]
            return
        code = 1
        try:
            for i, (_, end) in enumerate(pipes, start=1):
                os.dup2(end, i)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            warnings.showwarning = lambda *what: print(
                warnings.formatwarning(*what[:4]), file=sys.stderr
            )  # as before pytest
            os.environ.update(environment or {})
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # the tests' process may have one
            if first is not None:
                first()
            a_fit.main(*map(str, arguments))
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            traceback.print_exc()
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self, how=os.WNOHANG):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        return self.poll(how=0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=120):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                pytest.fail(f"it did not end: {self.communicate()}")
            time.sleep(0.005)
        texts = [pipe.read() for pipe in self.outputs]
        for pipe in self.outputs:
            pipe.close()
        return texts


def interpreter(*arguments, env=ENVIRONMENT, **options):
    """A fresh interpreter."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        **options,
    )  # fmt: skip


def outcome(process):
    """Exit code and what was said."""
    out, error = process.communicate(timeout=180)
    return process.returncode, out, error


def run(*arguments, **options):
    """The outcome of ``a_fit.py``."""
    return outcome(Forked(*arguments, **options))


def pair(*arguments):
    """Two processes that train together, with nobody to watch over them (as on two machines).

    In fresh interpreters: what a process group starts in a fork may hang on the threads that its parent had.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    return [interpreter(SCRIPT, *arguments, env=ENVIRONMENT | rank) for rank in ranks]


def small_disk(limit):
    """In a child: no file may grow beyond ``limit`` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def weights(folder):
    return safetensors.torch.load_file(folder / "weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def history(folder):
    """Without the seconds, which never are the same."""
    rows = checkpoint.newest(folder / "checkpoints")["history"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def steps_done(folder):
    found = checkpoint.paths(folder / "checkpoints")
    return int(found[-1].stem[5:]) if found else 0


def wait_for(folder, step, process):
    """Until a checkpoint of this step is there."""
    until = time.monotonic() + 120
    while steps_done(folder) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, f"step {step} was not reached"
        time.sleep(0.001)


def last_line(error):
    """What the user reads last; printed, for the record of the faults."""
    sentence = error.strip().splitlines()[-1]
    print(sentence)
    return sentence


def mount(folder, *options):
    """Mount a small file system in memory, or skip."""
    found = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "none", str(folder)], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {found.stderr.strip()}")
