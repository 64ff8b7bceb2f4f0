"""Recorded runs: what ``metrics.json`` holds, and what the book shows of it."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from predoc_lib import __version__
from predoc_lib.files import whole
from predoc_lib.schema import KEYS as KEYS
from predoc_lib.schema import NAME, ResultError, check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PACKAGES = ("torch", "torchdiffeq", "numpy")
MAX_WEIGHTS = 3_000_000  # bytes of a file that is committed


def record(
    experiment: str,
    config: Any,
    metrics: dict[str, Any],
    *,
    device: torch.device,
    wall_time_s: float,
    evaluations: int,
    data: dict[str, str],
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """What a run leaves behind: its figures and all that is needed to make them again.

    Args:
        experiment: its name.
        config: its Config, with a field ``seed``.
        metrics: the figures, nested dictionaries of numbers.
        device: that it ran on.
        wall_time_s: seconds of training alone.
        evaluations: of the vector field, in one forward pass of a training step.
        data: {"name", "sha256"}.
        history: rows of ``training.fit``.
    """
    return {
        "experiment": experiment,
        "metrics": metrics,
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "revision": revision(),
        "versions": versions(),
        "device": device_name(device),
        "wall_time_s": round(wall_time_s, 1),
        "evaluations": evaluations,
        "data": data,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "history": history,
    }


def versions() -> dict[str, str]:
    """Of Python, this library and the packages that figures depend on."""
    found = {"python": platform.python_version(), "predoc-lib": __version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def save(folder: Path, rec: dict[str, Any]) -> None:
    """Write ``metrics.json`` into a folder; the file appears whole or not at all."""
    check(rec, folder)
    with whole(Path(folder) / "metrics.json") as temporary:
        temporary.write_text(json.dumps(rec, indent=1) + "\n")


def load(folder: Path) -> dict[str, Any]:
    """Read the ``metrics.json`` of a folder.

    Raises:
        ResultError: it is absent, damaged or lacks a key.
    """
    path = Path(folder) / "metrics.json"
    try:
        rec = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read as a recorded run: {error}.") from error
    check(rec, path)
    return rec


def promote(run: Path, name: str, *, half: bool = True, weights: bool = True, files: tuple[str, ...] = ()) -> Path:
    """Copy a finished run's record and its weights to ``results/<experiment>/<name>/``; all appears at once.

    Args:
        run: its folder.
        name: of the result; one that is there already may only be the same, and is left alone.
        half: halve the precision of the weights, except of a tensor whose values half precision cannot hold.
        weights: copy them; else the record alone.
        files: others of the run to copy as they are.

    Raises:
        ResultError: the run is not finished, the name cannot be used or is taken, or the weights cannot be read, or a
            file is larger than 3 MB.
    """
    rec = load(run)
    target = _place(rec["experiment"], name)
    tensors = _weights(Path(run) / "weights.safetensors", half) if weights else {}
    temporary = target.with_name(f".{name}.{os.getpid()}")
    if large := [file for file in files if (Path(run) / file).stat().st_size > MAX_WEIGHTS]:
        raise ResultError(f"{Path(run) / large[0]} is larger than the {MAX_WEIGHTS / 1e6:.0f} MB of a recorded file.")
    try:
        save(temporary, rec)
        for file in files:
            shutil.copyfile(Path(run) / file, temporary / file)
        if weights:
            with whole(temporary / "weights.safetensors") as file:
                safetensors.torch.save_file(tensors, file)
        if not target.exists() or _content(target) != _content(temporary):
            temporary.replace(free_name(rec["experiment"], name))
    except (OSError, safetensors.SafetensorError) as error:
        raise ResultError(f"Nothing can be recorded in {target}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def free_name(experiment: str, name: str) -> Path:
    """Where a result of this name would lie.

    Raises:
        ResultError: the name cannot be a folder's, or is taken.
    """
    target = _place(experiment, name)
    if target.exists():
        raise ResultError(f"There is a result {name!r} of {experiment} already: choose another name.")
    return target


def _place(experiment: str, name: str) -> Path:
    if not re.fullmatch(NAME, name):
        raise ResultError(
            f"A result's name may have letters, digits, '.', '-' and '_', and starts with none of '.-', got {name!r}."
        )
    return RESULTS / experiment / name


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _weights(path: Path, half: bool) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ResultError(f"The weights {path} cannot be read: {error}.") from error
    if half:
        tensors = {key: _halved(value) for key, value in tensors.items()}
    size = sum(value.nbytes for value in tensors.values())
    if size > MAX_WEIGHTS:
        raise ResultError(
            f"The weights {path} would have {size / 1e6:.1f} MB, and what is recorded may have "
            f"{MAX_WEIGHTS / 1e6:.0f}: record a smaller model, or results.promote(..., weights=False)."
        )
    return tensors


def _halved(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    found = value.half()
    return found if found.isfinite().all() else value


def figures(rec: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record by dotted name, such as "prediction.ode.psnr"."""

    def flat(tree: Any, name: str) -> dict[str, float]:
        if not isinstance(tree, dict):
            return {name: tree}
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}".lstrip(".")).items()}

    return flat(rec["metrics"], "")


def compare(records: dict[str, dict[str, Any]]) -> str:
    """A table in Markdown: a row for every figure that one of the records has, a column for each record."""
    columns = {name: figures(rec) for name, rec in records.items()}
    rows = dict.fromkeys(figure for column in columns.values() for figure in column)
    cells = [[row, *(f"{column[row]:.4g}" if row in column else "–" for column in columns.values())] for row in rows]
    return table(["figure", *columns], cells)


def experiments() -> list[str]:
    """Names of the experiments that have recorded runs."""
    return sorted({path.parent.parent.name for path in RESULTS.glob("*/[!.]*/metrics.json")})


def recorded(experiment: str) -> dict[str, dict[str, Any]]:
    """{name: record} of every run under ``results/<experiment>/``."""
    return {path.parent.name: load(path.parent) for path in sorted((RESULTS / experiment).glob("[!.]*/metrics.json"))}


def card(records: dict[str, dict[str, Any]]) -> str:
    """What ends a chapter, in Markdown: how the page was made, and each recorded run that it shows."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    page = (
        f"This page ran in {time.process_time():.0f} seconds of processor time on {device_name(torch.device('cpu'))}, "
        f"with {made}; its seeds are in its cells. "
    )
    if not records:
        return page + "It shows no recorded run."
    rows = [
        {
            "run": name, "seed": r["seed"], "minutes": f"{r['wall_time_s'] / 60:.1f}", "evaluations": r["evaluations"],
            "device": r["device"], "data (sha256)": f"{r['data']['name']} ({r['data']['sha256'][:8]})",
            "revision": r["revision"][:8], "torch": r["versions"]["torch"], "date": r["date"],
        }
        for name, r in records.items()
    ]  # fmt: skip
    same = {key: value for key, value in rows[0].items() if len(rows) > 1 and all(row[key] == value for row in rows)}
    header = [key for key in rows[0] if key not in same]
    all_have = f" All have {', '.join(f'{key} {value}' for key, value in same.items())}." if same else ""
    runs = table(header, [[row[key] for key in header] for row in rows])
    return f"{page}Recorded runs that it shows:{all_have}\n\n{runs}"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, for IPython's ``Markdown``."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several runs, standard deviation, as text; a dash where there is no value."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):z.{digits}f}"  # z: no minus before a zero
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


@functools.cache
def revision() -> str:
    """The code's, of git, when it is first asked for: a long run asks before it starts."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's name, and how many threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    return f"{model}, {torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"
