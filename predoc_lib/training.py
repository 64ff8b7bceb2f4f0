"""The training loop that every experiment uses."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm


class TrainingError(RuntimeError):
    """Training cannot go on: the message says at which step, why, and what was kept."""


class WeightsError(ValueError):
    """Weights that cannot be used: the message names the file and what does not fit."""


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    evaluate_every: int = 500,
    show: str = "",
    folder: Path | None = None,
    progress: bool | None = None,
) -> tuple[list[dict[str, Any]], float]:
    """Minimize loss(step) over the model's parameters with Adam, a short warm-up and a cosine decay to zero.

    Args:
        model: trained in place.
        loss: the loss of one step, a scalar tensor.
        steps: number of steps.
        learning_rate: the highest.
        evaluate: called every ``evaluate_every`` steps and at the end, the model in evaluation mode, without gradients.
        evaluate_every: steps between evaluations, and between checkpoints.
        show: the figure of ``evaluate`` that the bar shows beside the loss.
        folder: where ``weights.safetensors`` is kept up to date; None: nowhere.
        progress: show a bar; None: if stderr is a terminal or a notebook.

    Returns:
        The history, one row an evaluation ({"step", "seconds", "loss", ...evaluate()}), and the seconds of training
        alone, without evaluations.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights of the last evaluation before it are kept.
        KeyboardInterrupt: after Ctrl-C, when the weights are saved.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    warm_up = min(100, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    history, seconds, recent = [], 0.0, []
    bar = tqdm(range(1, steps + 1), desc="training", unit="step", disable=None if progress is None else not progress)
    started = time.perf_counter()
    try:
        for step in bar:
            value = loss(step)
            _must_be_finite("loss", value, step, history, folder)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=50.0)
            _must_be_finite("gradient", norm, step, history, folder)
            optimizer.step()
            schedule.step()
            recent.append(value.detach())
            if step % evaluate_every == 0 or step == steps:
                row = {"step": step, "loss": torch.stack(recent).mean().item()}
                seconds += time.perf_counter() - started
                row["seconds"], recent = round(seconds, 3), []
                if evaluate is not None:
                    model.eval()
                    with torch.no_grad():
                        row |= evaluate()
                    model.train()
                history.append(row)
                bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", show) if k in row})
                if folder is not None:
                    save_weights(model, folder / "weights.safetensors")
                started = time.perf_counter()
    except KeyboardInterrupt:
        if folder is not None:
            save_weights(model, folder / "weights.safetensors")
            print(f"Interrupted at step {step}: the weights are in {folder / 'weights.safetensors'}.", file=sys.stderr)
        raise
    return history, seconds


def _must_be_finite(what: str, value: Tensor, step: int, history: list[dict[str, Any]], folder: Path | None) -> None:
    if torch.isfinite(value):
        return
    kept = f"the weights of step {history[-1]['step']} are kept" if history else "no weights were saved yet"
    where = f" in {folder}" if folder and history else ""
    raise TrainingError(
        f"The {what} is {value.item()} at step {step}: training stopped; {kept}{where}. "
        "Try a smaller learning_rate, or look for bad values in the data."
    )


def save_weights(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model's weights as safetensors, in ``dtype`` if given; the file appears whole or not at all."""
    weights = {k: v.detach().to(dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors.torch.save_file(weights, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a model with the weights of a safetensors file (any floating type) and return it.

    Raises:
        WeightsError: the file is absent, damaged or of another model; it names the first weight that does not fit and
            both shapes.
    """
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors weights: {error}.") from error
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        expected, found = (list(w[name].shape) if name in w else "nothing" for w in (own, weights))
        if expected != found:
            raise WeightsError(
                f"{path} does not fit the model: it has {found} for {name!r}, the model {expected}. "
                "Build the model with the config in the metrics.json beside the weights."
            )
    model.load_state_dict({name: w.to(own[name].dtype) for name, w in weights.items()})
    return model
