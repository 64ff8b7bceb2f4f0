"""The training loop of every experiment: one process or many, killed and resumed, with the same result."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from predoc_lib import checkpoint
from predoc_lib.batches import Rows, Share, count_steps
from predoc_lib.interruptions import ADVICE, Saved, TrainingError, loaded, name_lost_peers, stop_requests
from predoc_lib.naming import unknown
from predoc_lib.precision import MODES, PRECISIONS, compiled, lower_precision

Loss = Callable[[nn.Module, Any, Rows], "Tensor | dict[str, Any]"]
Evaluate = Callable[[nn.Module, slice], "dict[str, Tensor | float]"]


@dataclasses.dataclass
class Fitted:
    """What ``fit`` returns.

    Attributes:
        history: one row an evaluation, {"step", "loss", ...figures, "seconds"}.
        seconds: of training alone, without evaluations and checkpoints, over all sessions of the run.
        is_main: this process is the one that writes (process 0).
    """

    history: list[dict[str, Any]]
    seconds: float
    is_main: bool


def fit(
    model: nn.Module,
    data: Any,
    loss: Loss,
    optimizer: Optimizer,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int,
    schedule: LRScheduler | None = None,
    clip: float = 0.0,
    ema: float = 0.0,
    precision: str = "float32",
    compile: bool | str = False,
    networks: list[nn.Module] | None = None,
    compilable: list[nn.Module] | None = None,
    accumulate: int = 1,
    workers: int = 0,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 500,
    show: str = "",
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    tensorboard: bool = False,
) -> Fitted:
    """Minimize a loss over a model's parameters; go on from the last checkpoint if the folder holds one.

    Under ``torchrun`` or ``accelerate launch`` every process takes its share of each batch.

    Args:
        model: trained in place; at the end it holds the averaged weights if ``ema`` is not 0.
        data: a map-style data set. Each epoch is a new permutation. One without a length is endless: row r of step s
            is sample (s - 1) * batch_size + r, never seen again. A method ``__getitems__`` may fetch a list of samples
            at once, a method ``collate`` may make the batch.
        loss: loss(model, batch, rows), the mean over these rows: a scalar, or {"loss": scalar, name: figure to follow}.
        optimizer: over the model's parameters.
        steps: optimizer steps; or else
        epochs: passes through the data.
        batch_size: samples of a step, over all processes and accumulated parts.
        schedule: of the learning rate, stepped after every step; see ``warm_up_cosine``.
        clip: longest gradient; a longer one is scaled down. 0: none is.
        ema: decay of an exponential moving average of the weights, which is then evaluated and kept; 0: none.
        precision: "bfloat16" runs ``networks`` in it (autocast); all else stays as it is.
        compile: compile ``compilable`` with torch.compile; a string is its mode, one of ``precision.MODES``.
        networks: the modules that may run in lower precision; None: the whole model.
        compilable: the modules that may be compiled; None: ``networks``.
        accumulate: parts into which every process divides its share of a batch, to save memory.
        workers: processes that load data.
        evaluate: evaluate(model, mine), the model in evaluation mode, without gradients: {name: one value a sample} of
            the validation samples ``[mine]``, a slice that is another one in every process; the means are recorded.
        evaluate_every: steps between evaluations, each followed by a checkpoint.
        show: the figure that the progress bar shows beside the loss.
        folder: of the run, for ``checkpoints/`` and ``weights.safetensors``; None: nothing is written.
        identity: what the run is made of; a checkpoint of another identity is refused.
        seed: of the order of the data and of the rows' noise.
        device: "cpu" or "cuda"; the number of a GPU is chosen by Accelerate.
        progress: show a bar; None: if stderr is a terminal.
        tensorboard: log the history to ``folder/tensorboard``.

    Raises:
        ValueError: an option that is not valid; it says which.
        TrainingError: the loss or its gradient is not finite, a solve fails, the data cannot be loaded, another process
            is gone, or the disk does not take the checkpoint; the last checkpoint stays.
        CheckpointError: the folder's checkpoints are of another run, or all damaged.
        KeyboardInterrupt, SystemExit: after SIGINT or SIGTERM, when a checkpoint is saved.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard=True needs the package tensorboard: pip install tensorboard.")
    device, folder = torch.device(device), None if folder is None else Path(folder)
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = accelerate.Accelerator(
        cpu=many and device.type == "cpu",
        log_with="tensorboard" if tensorboard and folder else None,
        project_dir=folder,
    )
    device = accelerator.device if many else device
    steps = count_steps(data, steps, epochs, batch_size)
    share = Share(batch_size, accumulate, accelerator.num_processes, accelerator.process_index, seed)
    if precision not in PRECISIONS:
        raise ValueError(unknown("precision", precision, PRECISIONS))
    mode = compile if isinstance(compile, str) else "default"
    if mode not in MODES:
        raise ValueError(unknown("mode of compile", mode, MODES))
    saved = Saved(folder, identity or {})
    found = saved.load()
    if tensorboard and folder:
        accelerator.init_trackers("tensorboard")
    if share.rank:
        torch.manual_seed(seed + share.rank)  # else dropout, say, would drop the same units in every process

    model.to(device)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    result = averaged.module if averaged else model
    objective = _Objective(model, loss)
    if many:
        objective = accelerator.prepare(objective)
    networks = [model] if networks is None else networks
    compilable = networks if compilable is None else compilable
    parameters = list(model.parameters())
    kept = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": averaged}
    kept = {name: thing for name, thing in kept.items() if thing is not None}
    run = {"step": 0, "history": [], "seconds": 0.0, "sums": {}}
    if found is not None:
        run = {name: found[name] for name in run}
        for name, thing in kept.items():
            thing.load_state_dict(found[name])
        if share.rank < len(found["random"]):  # else there are more processes than before
            checkpoint.set_random_state(found["random"][share.rank])

    def differentiate(step: int, batches: Iterator[Any]) -> tuple[dict[str, float], int]:
        """Fill the gradients; the figures of the step, and the signal that one of the processes got, or 0."""
        figures = []
        optimizer.zero_grad(set_to_none=True)
        for part in range(accumulate):
            batch = accelerate.utils.send_to_device(next(batches), device)
            last = part + 1 == accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(objective), saved.diverged(step):
                figures.append(objective(batch, share.rows(step, part, device)))
                (figures[-1]["loss"] / accumulate).backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        values, stop = _agree(accelerator, figures, norm, requests)
        for name in ("loss", "gradient"):
            if not math.isfinite(values[name]):
                raise TrainingError(
                    f"The {name} is {values[name]} at step {step}: training stopped. {saved.kept()} {ADVICE}"
                )
        if clip and values["gradient"] > clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return values, stop

    def update() -> None:
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if averaged:
            averaged.update_parameters(model)

    def note() -> None:
        """A row of the history: means of the figures since the last one, and an evaluation."""
        row = {"step": run["step"]} | {name: total / n for name, (total, n) in run["sums"].items()}
        row["seconds"], run["sums"] = round(run["seconds"], 3), {}
        with saved.diverged(run["step"]):
            row |= _evaluated(accelerator, result, evaluate)
        model.train()
        run["history"].append(row)
        _show(bar, run["history"], show)
        accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def save() -> None:
        randoms = accelerate.utils.gather_object([checkpoint.random_state()])
        if accelerator.is_main_process:
            states = {name: thing.state_dict() for name, thing in kept.items()}
            saved.save(run | states | {"steps": steps, "random": randoms}, result)

    bar = tqdm(
        total=steps, initial=run["step"], desc="training", unit="step",
        disable=(None if progress is None else not progress) if accelerator.is_main_process else True,
    )  # fmt: skip
    loader = share.load(data, range(run["step"] + 1, steps + 1), workers)
    with (
        bar, stop_requests() as requests,
        compiled(compilable if compile else [], mode),
        lower_precision(networks, precision, device.type),
        name_lost_peers(share.processes, saved), contextlib.closing(loaded(loader, run, saved)) as batches,
    ):  # fmt: skip
        model.train()
        _show(bar, run["history"], show)
        started = time.perf_counter()
        while run["step"] < steps:
            values, stop = differentiate(run["step"] + 1, batches)
            update()
            run["step"] += 1
            for name, value in values.items():
                total, n = run["sums"].get(name, (0.0, 0))
                run["sums"][name] = (total + value, n + 1)
            bar.update()
            due = run["step"] % evaluate_every == 0 or run["step"] == steps
            if due or stop:
                run["seconds"] += time.perf_counter() - started
                if due:
                    note()
                save()
                if stop:
                    saved.leave(signal.Signals(stop), run["step"], accelerator.is_main_process)
                started = time.perf_counter()
        if requests:  # after the last step
            saved.leave(signal.Signals(requests[0]), run["step"], accelerator.is_main_process)
    for tracker in accelerator.trackers:
        tracker.finish()
    if averaged:
        model.load_state_dict(averaged.module.state_dict())
    return Fitted(run["history"], run["seconds"], accelerator.is_main_process)


def warm_up_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """The learning rate rises over a tenth of the steps (100 at most), then falls along a cosine to zero."""
    warm_up = min(100, max(1, steps // 10))
    return LambdaLR(optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps)))


class _Objective(nn.Module):
    """The loss as a module's forward, which is where data-parallel training hooks in."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any, rows: Rows) -> dict[str, Any]:
        found = self.loss(self.model, batch, rows)
        return found if isinstance(found, dict) else {"loss": found}


def _agree(
    accelerator: accelerate.Accelerator, figures: list[dict[str, Any]], norm: Tensor, requests: list[int]
) -> tuple[dict[str, float], int]:
    """Means of the figures over parts and processes, and the signal that one of the processes got, or 0."""
    parts = {name: [float(torch.as_tensor(f[name]).detach()) for f in figures] for name in figures[0]}
    values = {name: sum(part) / len(part) for name, part in parts.items()} | {"gradient": float(norm)}
    table = [[*values.values(), max(requests, default=0)]]
    if accelerator.num_processes > 1:
        table = accelerator.gather(torch.tensor(table, dtype=torch.float64, device=norm.device)).tolist()
    *columns, signals = zip(*table, strict=True)
    return {name: sum(c) / len(c) for name, c in zip(values, columns, strict=True)}, int(max(signals))


def _evaluated(accelerator: accelerate.Accelerator, model: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
    """Means over the samples of all processes."""
    if evaluate is None:
        return {}
    model.eval()
    with torch.no_grad():
        found = evaluate(model, slice(accelerator.process_index, None, accelerator.num_processes))
    if not found:
        return {}
    values = [torch.as_tensor(value, dtype=torch.float64, device=accelerator.device) for value in found.values()]
    sums = accelerator.reduce(torch.stack([torch.stack([v.sum(), torch.tensor(v.numel()).to(v)]) for v in values]))
    return dict(zip(found, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


def _show(bar: tqdm, history: list[dict[str, Any]], show: str) -> None:
    for row in history[-1:]:
        bar.set_postfix({name: f"{row[name]:.4g}" for name in ("loss", show) if name in row})
