"""What every experiment's ``Config`` shares: documented fields, three presets, checks that name what is wrong."""

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from predoc_lib.batches import Share
from predoc_lib.data import catalog
from predoc_lib.naming import unknown
from predoc_lib.precision import emulated
from predoc_lib.training import PRECISIONS, warm_up_cosine

PRESETS = ("smoke", "book", "thesis")
"""``smoke``: seconds, for tests. ``book``: at most 15 minutes on 2 CPU cores. ``thesis``: the report's sizes."""

DEVICES = ("auto", "cpu", "cuda")
TWICE = (
    "Parameter 'compile' must be False for objective {!r}: its loss holds a derivative, which training derives again, "
    "and torch.compile cannot."
)
EMULATED = (
    "This processor has no instructions for bfloat16 and emulates it, which takes longer than float32 does. Use "
    "precision 'float32', or a GPU."
)
NO_GPU = "device 'cuda' was asked for, but PyTorch finds no GPU here. Use 'auto' or 'cpu'."


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


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The parameters of every experiment that ``training.fit`` trains; a Config adds its own, or other defaults."""

    steps: int = option(3000, "optimizer steps", low=1)
    batch_size: int = option(32, "samples a step, over all processes", low=1)
    learning_rate: float = option(3e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(50.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    ema: float = option(0.0, "decay of the moving average of the weights that is measured and kept; 0: none", low=0)
    precision: str = option("float32", "of the networks in training", choices=PRECISIONS)
    compile: bool = option(False, "compile the networks with torch.compile")
    accumulate: int = option(1, "parts into which each process divides its share of a batch, to save memory", low=1)
    workers: int = option(0, "processes that make the batches ahead of time", low=0)
    evaluate_every: int = option(0, "steps between evaluations and checkpoints; 0: a 40th of the run", low=0)
    tensorboard: bool = option(False, "log the history for TensorBoard, in the run's folder")
    seed: int = option(0, "of the weights, the data and the noise", low=0)
    device: str = option("auto", "auto: a GPU if there is one", choices=DEVICES)

    def __post_init__(self) -> None:
        check(self)
        if self.ema >= 1:
            raise ConfigError(f"Parameter 'ema' must be less than 1, got {self.ema}.")

    def require_data(self) -> None:
        """Raise ``catalog.DataError`` if the data set is not there; an experiment that has none need not say so."""
        if hasattr(self, "dataset"):
            catalog.require(self.dataset)

    def require_machine(self, num_processes: int = 1) -> None:
        """Raise ConfigError if the device is not there, or so many processes cannot share a GPU each or the batch.

        Warn of a precision that the processor has to emulate.
        """
        gpus = torch.cuda.device_count()  # unlike is_available, it leaves CUDA as it is for processes that are forked
        if self.device == "cuda" and not gpus:
            raise ConfigError(NO_GPU)
        if self.device != "cpu" and 0 < gpus < num_processes:
            raise ConfigError(f"num_processes must be at most the number of GPUs here, {gpus}, got {num_processes}.")
        if (self.device == "cpu" or not gpus) and emulated(self.precision):
            warnings.warn(EMULATED, stacklevel=3)
        try:
            Share(self.batch_size, self.accumulate, num_processes, 0, self.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def training(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of ``training.fit`` that these parameters are."""
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        return {
            "optimizer": optimizer,
            "schedule": warm_up_cosine(optimizer, self.steps),
            "evaluate_every": self.evaluate_every or max(10, self.steps // 40),
            "identity": dataclasses.asdict(self),
            "device": choose_device(self.device),
        } | {
            name: getattr(self, name)
            for name in (
                "steps", "batch_size", "clip", "ema", "precision", "compile", "accumulate", "workers", "seed",
                "tensorboard",
            )
        }  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device that one of ``DEVICES`` names; "auto" is a GPU if there is one, each process's own if there are many.

    Raises:
        ConfigError: "cuda" where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(NO_GPU)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if "LOCAL_RANK" in os.environ else torch.device("cuda")
