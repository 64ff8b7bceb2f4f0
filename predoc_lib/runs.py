"""The folder of a run: who works in it, what state it is in.

``run.json`` says what the run is made of; ``.lock`` is held, in the kernel's sense, exactly as long as a process trains
there, however that process ends.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from predoc_lib import checkpoint, results
from predoc_lib.files import whole

STATES = ("running", "finished", "killed", "failed")


class RunError(ValueError):
    """A run folder that cannot be used: the message says why, and what to do."""


@contextlib.contextmanager
def claim(folder: Path, experiment: str, config: Any, num_processes: int = 1) -> Iterator[None]:
    """Work in a run's folder: no other process can, and an error in the block is noted there.

    Args:
        folder: made if it is not there; a run that was stopped in it goes on.
        experiment: its name.
        config: its Config, a dataclass.
        num_processes: that train together.

    Raises:
        RunError: the folder cannot be written, another process trains in it, or ``run.json`` is damaged.
        CheckpointError: it holds another run; the message names the fields that differ.
    """
    folder = Path(folder)
    note = {
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "num_processes": num_processes,
        "host": platform.node(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "error": None,
    }
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        if not _take(lock):
            raise RunError(f"{folder} is being trained in by another process: wait for it, or choose another folder.")
        before = _read(folder)  # under the lock: no other process can write it now
        if before is not None:
            mine, found = ({"experiment": run["experiment"]} | run["config"] for run in (note, before))
            checkpoint.must_be_same(mine, found, folder)
            note["started"] = before.get("started") or note["started"]
        with _writing(folder):
            _write(folder, note)
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk, say, which may be the error itself
                _write(folder, note | {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
            raise


def state(folder: Path) -> str:
    """One of ``STATES``: "killed" is every run that has ended without a result or an error, and can go on."""
    if _is_locked(folder):
        return "running"
    with contextlib.suppress(results.ResultError):
        results.load(folder)
        return "finished"
    return "failed" if (_read(folder) or {}).get("error") else "killed"


def config_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The experiment of a run and its parameters.

    Raises:
        RunError: there is no run, or its ``run.json`` is damaged.
    """
    found = _read(Path(folder))
    if found is None:
        raise RunError(f"{folder} holds no run: there is no run.json.")
    return found["experiment"], found["config"]


def processes_of(folder: Path) -> int:
    """How many processes trained a run together when it was last started; 1 if it was not, or does not say.

    Raises:
        RunError: its ``run.json`` is damaged.
    """
    found = (_read(Path(folder)) or {}).get("num_processes")
    return found if isinstance(found, int) and found > 0 else 1


def listing(root: Path) -> list[dict[str, Any]]:
    """Every run under a folder, by name: {"experiment", "name", "state", "step", "steps", "row", "folder"}.

    "row" is the last of its history; a file that cannot be read is named in it.
    """
    rows = []
    for folder in sorted(path.parent for path in Path(root).glob("**/run.json")):
        row = {"name": folder.name, "folder": folder, "step": 0, "steps": None, "row": {}}
        try:
            row["experiment"], _ = config_of(folder)
            row["state"] = state(folder)
            row |= _newest(folder)
        except (RunError, checkpoint.CheckpointError) as error:
            row = {"experiment": "?", "state": "damaged"} | row | {"row": {"problem": str(error)}}
        rows.append(row)
    return rows


def _newest(folder: Path) -> dict[str, Any]:
    """What the listing shows of a run's newest checkpoint."""
    found = checkpoint.paths(folder / "checkpoints")
    if not found:
        return {}
    known = checkpoint.summary(found[-1])
    try:
        history = known["history"]
        return {"step": known["step"], "steps": known["steps"], "row": dict(history[-1]) if history else {}}
    except (ValueError, TypeError, LookupError) as error:
        raise checkpoint.CheckpointError(f"{found[-1]} is a checkpoint without a run's step and history.") from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"Nothing can be written in {folder}: {error.strerror}. Choose another folder.") from error


def _lock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nobody is kept out
        return True
    return True


def _take(file: Any) -> bool:
    """Lock for good; ``_is_locked``, elsewhere, may be in the way for a moment."""
    for _ in range(20):
        if _lock(file, fcntl.LOCK_EX):
            return True
        time.sleep(0.02)
    return False


def _is_locked(folder: Path) -> bool:
    try:
        with (Path(folder) / ".lock").open("r") as file:
            return not _lock(file, fcntl.LOCK_SH)  # shared: two that look do not take each other for a run
    except OSError:
        return False


def _read(folder: Path) -> dict[str, Any] | None:
    path = Path(folder) / "run.json"
    try:
        found = json.loads(path.read_text())
        if not isinstance(found["experiment"], str) or not isinstance(found["config"], dict):
            raise ValueError("experiment and config are wanted")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): choose another folder, or delete this one.") from error
    return found


def _write(folder: Path, note: dict[str, Any]) -> None:
    with whole(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(note, indent=1) + "\n")
