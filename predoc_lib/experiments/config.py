"""What every experiment's ``Config`` shares: documented fields, three presets, checks that name what is wrong."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from predoc_lib.naming import unknown

PRESETS = ("smoke", "book", "thesis")
"""``smoke``: seconds, for tests. ``book``: at most 15 minutes on 2 CPU cores. ``thesis``: the report's sizes."""

DEVICES = ("auto", "cpu", "cuda")


class ConfigError(ValueError):
    """A wrong parameter: the message says what was given, what is valid and the nearest valid name."""


def option(default: Any, meaning: str, *, choices: Iterable | None = None, low: float | int | None = None) -> Any:
    """A field of a ``Config``: its default, what it means (unit, range, the report's value) and what is allowed."""
    metadata = {"meaning": meaning, "choices": None if choices is None else tuple(choices), "low": low}
    return dataclasses.field(default=default, metadata=metadata)


def choose(value: Any, valid: Iterable, what: str) -> Any:
    """Return ``value`` if it is one of ``valid``, else raise ConfigError with the list and the nearest name."""
    valid = tuple(valid)
    if value not in valid:
        raise ConfigError(unknown(what, value, valid))
    return value


def build(config_class: type, preset: str = "book", **overrides: Any) -> Any:
    """The ``Config`` of a preset with some fields changed; an override of None keeps the preset's value.

    Raises:
        ConfigError: unknown preset, unknown field, a value of the wrong type or outside its range.
    """
    choose(preset, PRESETS, "preset")
    names = [f.name for f in dataclasses.fields(config_class)]
    for name in overrides:
        choose(name, names, "parameter")
    given = {k: v for k, v in overrides.items() if v is not None}
    return config_class(**{**config_class.presets[preset], **given})


def check(config: Any) -> None:
    """Check every field of a Config against its type, choices and range (call it from ``__post_init__``)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        wanted = f.type if isinstance(f.type, type) else type(f.default)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(config, f.name, value := float(value))
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(
                f"Parameter {f.name!r} must be {wanted.__name__}, got {value!r} ({type(value).__name__})."
            )
        if f.metadata["choices"] is not None:
            choose(value, f.metadata["choices"], f"value of {f.name!r}:")
        low = f.metadata["low"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"Parameter {f.name!r} must be finite, got {value!r}.")
        if low is not None and value < low:
            raise ConfigError(f"Parameter {f.name!r} must be at least {low}, got {value!r}.")


def choose_device(name: str) -> torch.device:
    """The device that one of ``DEVICES`` names; "auto" is a GPU if there is one.

    Raises:
        ConfigError: "cuda" where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but PyTorch finds no GPU here. Use 'auto' or 'cpu'.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def main(config_class: type, run: Callable[..., dict[str, Any]]) -> None:
    """The command line of an experiment: ``--preset``, ``--folder`` and one option for every field of its Config."""
    parser = argparse.ArgumentParser(description=run.__doc__.splitlines()[0])
    parser.add_argument("--preset", default="book", help=" | ".join(PRESETS))
    parser.add_argument("--folder", type=Path, help="where metrics.json and weights.safetensors are written")
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
        record = run(config, folder)
    except ValueError as error:  # a parameter or data that the user can mend
        sys.exit(f"{parser.prog}: {error}")
    print(
        f"{record['wall_time_s']} s of training{f'; in {folder}: {chr(44).join(os.listdir(folder))}' if folder else ''}"
    )
