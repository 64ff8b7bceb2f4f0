"""What may end a training (a signal, bad data, a full disk, another process that dies), and what is kept then."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn
from torch.utils.data import DataLoader

from predoc_lib import checkpoint
from predoc_lib.guards import SolverError

ADVICE = "Try a smaller learning_rate, or look for bad values in the data."


class TrainingError(RuntimeError):
    """Training cannot go on: the message says at which step, why, and what was kept."""


class Saved:
    """The checkpoints and the weights of a run; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint, if it is of this run."""
        if self.folder is None:
            return None
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"Nothing can be kept in {self.folder}: {error.strerror or error}.") from error
        found = checkpoint.newest(self.checkpoints)
        if found is not None:
            checkpoint.must_be_same(self.identity, found["identity"], self.checkpoints)
        return found

    def save(self, state: dict[str, Any], model: nn.Module) -> None:
        """Write a checkpoint and the weights."""
        if self.folder is None:
            return
        try:
            # In this order: a run that is killed in between computes both again.
            checkpoint.save_weights(model, self.folder / "weights.safetensors")
            checkpoint.save(self.checkpoints, state["step"], state | {"identity": self.identity})
        except (OSError, safetensors.SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint of step {state['step']} cannot be saved in {self.folder}: "
                f"{getattr(error, 'strerror', None) or error}. {self.kept()} Make room, and start the run again."
            ) from error

    def kept(self) -> str:
        """A sentence that says what there is."""
        found = [] if self.folder is None else checkpoint.paths(self.checkpoints)
        return f"The checkpoint {found[-1]} is kept." if found else "No checkpoint was saved yet."

    @contextlib.contextmanager
    def diverged(self, step: int) -> Iterator[None]:
        """What a model says of numbers that are not finite, with the step and with what is kept."""
        try:
            yield
        except (SolverError, FloatingPointError) as error:
            raise TrainingError(f"{error} Training stopped at step {step}. {self.kept()} {ADVICE}") from error

    def leave(self, stop: signal.Signals, step: int, say: bool) -> None:
        """Say what was saved after SIGINT or SIGTERM, and leave."""
        if say:
            kept = "nothing is kept" if self.folder is None else f"start the run in {self.folder} again to go on"
            print(f"Stopped by {stop.name} after step {step}: {kept}.", file=sys.stderr)
        if stop == signal.SIGTERM:
            sys.exit(128 + stop)
        raise KeyboardInterrupt


def loaded(loader: DataLoader, run: dict[str, Any], saved: Saved) -> Iterator[Any]:
    """The batches of a loader; raises TrainingError with the step and the cause if one cannot be loaded."""
    try:
        yield from loader
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise TrainingError(
            f"The data of step {run['step'] + 1} cannot be loaded: {type(error).__name__}: {lines[-1]}. {saved.kept()}"
        ) from error


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into, for the loop to see; a second one acts at once."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def ask(number: int, frame: Any) -> None:
        requests.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        restore()


@contextlib.contextmanager
def name_lost_peers(processes: int, saved: Saved) -> Iterator[None]:
    """Whatever waits for another process fails when that one is gone; gloo and NCCL say it in ways of their own."""
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if processes == 1 or not lost:
            raise
        raise TrainingError(
            f"Another process of this run is gone, so this one stops too. {saved.kept()} ({str(error).splitlines()[0]})"
        ) from error
