"""Recorded runs: what ``metrics.json`` holds, and what the book shows of it."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from predoc_lib import __version__

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
KEYS = (
    "experiment", "metrics", "config", "seed", "revision", "versions",
    "device", "wall_time_s", "evaluations", "data", "date", "history",
)  # fmt: skip
PACKAGES = ("torch", "torchdiffeq", "numpy")


class ResultError(ValueError):
    """A record that is absent or not whole: the message names the file and what it lacks."""


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
        "revision": _revision(),
        "versions": {"python": platform.python_version(), "predoc-lib": __version__}
        | {p: importlib.metadata.version(p) for p in PACKAGES},
        "device": device_name(device),
        "wall_time_s": round(wall_time_s, 1),
        "evaluations": evaluations,
        "data": data,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "history": history,
    }


def save(folder: Path, rec: dict[str, Any]) -> None:
    """Write ``metrics.json`` into a folder; the file appears whole or not at all."""
    _check(rec, folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".metrics.json.{os.getpid()}"
    temporary.write_text(json.dumps(rec, indent=1) + "\n")
    temporary.replace(folder / "metrics.json")


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
    _check(rec, path)
    return rec


def recorded(experiment: str) -> dict[str, dict[str, Any]]:
    """{name: record} of every run under ``results/<experiment>/``."""
    return {path.parent.name: load(path.parent) for path in sorted((RESULTS / experiment).glob("*/metrics.json"))}


def card(records: dict[str, dict[str, Any]]) -> str:
    """The table that ends a chapter, in Markdown: how each recorded run that it shows was made."""
    header = ["run", "seed", "device", "minutes", "evaluations", "data (sha256)", "revision", "torch", "date"]
    rows = [
        [
            name,
            r["seed"],
            r["device"],
            f"{r['wall_time_s'] / 60:.1f}",
            r["evaluations"],
            f"{r['data']['name']} ({r['data']['sha256'][:8]})",
            r["revision"][:8],
            r["versions"]["torch"],
            r["date"],
        ]
        for name, r in records.items()
    ]
    return table(header, rows)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, for IPython's ``Markdown``."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several runs, standard deviation, as text; a dash where there is no value."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _check(rec: Any, where: Path) -> None:
    missing = [key for key in KEYS if not isinstance(rec, dict) or key not in rec]
    if missing:
        raise ResultError(f"{where}: a record needs {', '.join(KEYS)}; it lacks {', '.join(missing)}.")


def _revision() -> str:
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return git.stdout.strip()
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
