"""What runs an experiment: in a folder of its own, from a notebook or a terminal, in one process or in many."""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch

from predoc_lib import results, runs
from predoc_lib.experiments.config import PRESETS, build
from predoc_lib.training import TrainingError

Record = dict[str, Any]


def experiment(name: str) -> Callable:
    """Make ``train(config, folder, progress) -> record`` the ``run`` of an experiment.

    ``run(config, folder=None, progress=None, num_processes=1)`` asks for the data, claims the folder (see
    ``runs.claim``), trains, writes the record there and returns it; processes other than the first return None. With
    ``num_processes`` it starts as many, on as many GPUs if there are any, through Accelerate's notebook launcher.
    """

    def decorate(train: Callable[..., Record | None]) -> Callable[..., Record | None]:
        @functools.wraps(train)
        def run(
            config: Any, folder: Path | None = None, progress: bool | None = None, num_processes: int = 1
        ) -> Record | None:
            config.require_data()
            if "RANK" not in os.environ:  # else the processes are there, and may be on several machines
                config.require_machine(num_processes)
            results.revision()  # of the code that runs, not of what the files have become when it is done
            if num_processes > 1 and "RANK" not in os.environ:
                return _launch(run, config, folder, progress, num_processes)
            if folder is None or int(os.environ.get("RANK", 0)):
                return train(config, folder, progress)
            with runs.claim(folder, name, config, num_processes):
                record = train(config, folder, progress)
                results.save(Path(folder), record)
            return record

        return run

    return decorate


def _launch(run: Callable, config: Any, folder: Path | None, progress: bool | None, num_processes: int) -> Record:
    # What an earlier training in this process left behind; a launch wants none.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def one_thread_each(*arguments: Any) -> None:
        torch.set_num_threads(1)  # a forked process hangs in threads that its parent had
        run(*arguments)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = (config, folder or Path(scratch), progress, num_processes)
        with contextlib.redirect_stdout(io.StringIO()):  # the launcher's remarks on devices, which are not always true
            accelerate.notebook_launcher(
                one_thread_each,
                arguments,
                num_processes=num_processes,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
            )
        return results.load(folder or Path(scratch))


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def main(config_class: type, run: Callable[..., Record | None]) -> None:
    """The command line of an experiment: ``--preset``, ``--folder`` and one option for every field of its Config."""
    parser = argparse.ArgumentParser(description=run.__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", default="book", help=" | ".join(PRESETS))
    parser.add_argument("--folder", type=Path, help="where everything is kept; a run that is there goes on")
    for f in dataclasses.fields(config_class):
        kind = type(f.default)
        as_bool = {"type": _truth, "metavar": "true|false"}
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", help=f.metadata["meaning"], **(as_bool if kind is bool else {"type": kind})
        )
    given = vars(parser.parse_args())
    preset, folder = given.pop("preset"), given.pop("folder")
    try:
        config = build(config_class, preset, **given)
        record = run(config, folder, num_processes=int(os.environ.get("WORLD_SIZE", 1)))
    except (ValueError, TrainingError) as error:  # what the user can mend
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:  # the training has said what it saved
        sys.exit(130)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if record is not None:
        where = "" if folder is None else f"; in {folder}: {', '.join(sorted(os.listdir(folder)))}"
        print(f"{record['wall_time_s']} s of training{where}")
