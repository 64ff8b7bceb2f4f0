"""What every ``metrics.json`` holds, and the check of it."""

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


class ResultError(ValueError):
    """A record that is absent or not whole: the message names the file and what it lacks."""


def _is_number(value: Any) -> bool:
    """A finite one that a float can hold; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 0


def _is_metrics(tree: Any) -> bool:
    if isinstance(tree, dict):
        return all(isinstance(key, str) and _is_metrics(value) for key, value in tree.items())
    return _is_number(tree)


def _is_history(rows: Any) -> bool:
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and _is_metrics(row) and _is_count(row.get("step")) for row in rows
    ):
        return False
    steps = [row["step"] for row in rows]
    return all(a < b for a, b in itertools.pairwise(steps))


def _is_data(value: Any) -> bool:
    known = isinstance(value, dict) and _is_text(value.get("name"))
    return known and re.fullmatch("[0-9a-f]{64}", str(value.get("sha256"))) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "experiment": (lambda v: isinstance(v, str) and bool(re.fullmatch(NAME, v)), "a name"),
    "metrics": (lambda v: isinstance(v, dict) and _is_metrics(v), "finite numbers, in dictionaries by name"),
    "config": (lambda v: isinstance(v, dict) and all(map(_is_text, v)), "a dictionary of parameters"),
    "seed": (lambda v: isinstance(v, int) and _is_number(v), "a whole number"),
    "revision": (_is_text, "a git revision"),
    "versions": (lambda v: isinstance(v, dict) and all(map(_is_text, v.values())), "a version by package"),
    "device": (_is_text, "a device's name"),
    "wall_time_s": (lambda v: _is_number(v) and v >= 0, "seconds"),
    "evaluations": (_is_count, "a count"),
    "data": (_is_data, "a name and a sha256 of 64 hexadecimal digits"),
    "date": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"\d{4}-\d\d-\d\d", v)), "a date, YYYY-MM-DD"),
    "history": (_is_history, "rows of finite numbers with a step that increases"),
}  # fmt: skip
KEYS = tuple(SCHEMA)


def check(rec: Any, where: Path) -> None:
    """Raise ResultError unless a record has every key, each with a value of its kind; ``where`` is named."""
    missing = [key for key in KEYS if not isinstance(rec, dict) or key not in rec]
    if missing:
        raise ResultError(f"{where}: a record needs {', '.join(KEYS)}; it lacks {', '.join(missing)}.")
    for key, (is_valid, wanted) in SCHEMA.items():
        if not is_valid(rec[key]):
            raise ResultError(f"{where}: {key!r} must be {wanted}, got {str(rec[key])[:80]}.")
