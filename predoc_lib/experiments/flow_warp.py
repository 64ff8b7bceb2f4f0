"""Video as transport: a velocity field at any time from three frames, trained on frames alone (report, section 5.4)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from predoc_lib import checkpoint, results, training
from predoc_lib.baselines import copy_last, cross_fade
from predoc_lib.batches import Rows
from predoc_lib.data import read_video
from predoc_lib.data.driving import driving
from predoc_lib.experiments.config import TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.experiments.yolo_clips import STEP, draw, starts
from predoc_lib.experiments.yolo_dynamics import TRAINING_SHARE, checksum, find
from predoc_lib.files import FileError
from predoc_lib.flow_warp import WarpODE, warp
from predoc_lib.flow_warp.losses import edge_aware_smoothness, photometric, slowness
from predoc_lib.metrics import endpoint_error, psnr
from predoc_lib.precision import layers_of

CONTEXT, LENGTH = 3, 9  # frames seen; frames of a clip
SIZE = (96, 160)  # of the frames, height and width
HALF_WAY, AHEAD = (0.5, 1.5), (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)  # what is measured; the context is at 0, 1, 2
FLOWS = {"seen": (1.0, 2.0), "half-way": (1.0, 1.5), "next": (2.0, 3.0), "three": (2.0, 5.0)}  # from, on whose grid


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    steps: int = option(2000, "optimizer steps", low=1)
    batch_size: int = option(8, "clips a step", low=1)
    learning_rate: float = option(1e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(1.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    video: str = option("", "a video file or folder of frames, also below PREDOC_DATA; empty: drawn drives")
    width: int = option(32, "channels of the layers", low=1)
    order: int = option(2, "of the velocity's polynomial in time", low=0)
    solver_steps: int = option(2, "of the solver from frame to frame (the report: 1)", low=1)
    method: str = option("midpoint", "of the solver (the report: euler)", choices=("euler", "midpoint", "heun", "rk4"))
    residual: bool = option(True, "correct frames after the context's, for new content (the report: no)")
    census_weight: float = option(0.1, "of the census in the photometric loss", low=0)
    smoothness: float = option(0.1, "weight of the edge-aware smoothness", low=0)
    slowness: float = option(0.06, "weight of the prior for slow velocities, in the last third of the steps", low=0)
    n_train: int = option(500, "drives that are drawn, each also mirrored", low=1)
    n_test: int = option(60, "unseen drives", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 6, "batch_size": 2, "n_train": 3, "n_test": 3, "width": 8},
        "book": {},
        "thesis": {"steps": 50_000, "batch_size": 32, "n_train": 4000, "width": 96, "n_test": 400},
    }


@dataclasses.dataclass(frozen=True)
class Unseen:
    """What is measured.

    Attributes:
        context: frames at t = 0, 1, 2.
        frames: the true frames, by their time.
        flows: by the names of ``FLOWS``: the true flow, and which pixels are seen at both times. Empty: nobody knows.
    """

    context: Float[Tensor, "N 3 C H W"]
    frames: dict[float, Float[Tensor, "N C H W"]]
    flows: dict[str, tuple[Float[Tensor, "N 2 H W"], Bool[Tensor, "N H W"]]]

    def __len__(self) -> int:
        return len(self.context)


class Frames(Dataset):
    """Clips of uint8 frames."""

    def __init__(self, clips: UInt8[Tensor, "N T C H W"]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, numbers: list[int]) -> Tensor:
        return self.clips[numbers].float() / 255

    @staticmethod
    def collate(frames: Tensor) -> Tensor:
        """It is a batch already."""
        return frames


def build_model(config: Config) -> WarpODE:
    """The untrained model of a Config."""
    return WarpODE(
        width=config.width, order=config.order, residual=config.residual, steps=config.solver_steps,
        method=config.method,
    )  # fmt: skip


def load(folder: Path) -> tuple[WarpODE, Config]:
    """The trained model of a run's or a recorded result's folder, and its Config.

    Raises:
        ResultError, WeightsError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    return checkpoint.load_weights(build_model(config), Path(folder) / "weights.safetensors").eval(), config


def drawn_unseen(n: int, split: str) -> Unseen:
    """One clip of each of n drives of a split, with the true flows."""
    t = [float(i) for i in range(CONTEXT)] + [*HALF_WAY, *AHEAD]
    frames = draw(n, split, torch.tensor(t) / STEP, False)[0].float() / 255
    flows = {name: [] for name in FLOWS}
    for scene, start in zip(driving(n, split), starts(n), strict=True):
        for name, (t0, t1) in FLOWS.items():
            flows[name].append(scene.flow(start + t0, start + t1))
    return Unseen(
        frames[:, :CONTEXT],
        {at: frames[:, i] for i, at in enumerate(t) if i >= CONTEXT},
        {name: tuple(torch.stack(x) for x in zip(*found, strict=True)) for name, found in flows.items()},
    )


def video_unseen(frames: UInt8[Tensor, "T C H W"]) -> Unseen:
    """All clips of a video, two of its frames from step to step: half-way lies one that is not seen."""
    t = [*range(CONTEXT), *HALF_WAY, *AHEAD]
    length = int(2 * max(t)) + 1
    if len(frames) < length:
        raise FileError(f"A clip takes {length} frames, there are {len(frames)}: take a longer video.")
    clips = frames.unfold(0, length, 1).movedim(-1, 1).float() / 255
    return Unseen(clips[:, [2 * i for i in range(CONTEXT)]], {float(x): clips[:, int(2 * x)] for x in t[CONTEXT:]}, {})


def data_of(config: Config) -> tuple[Frames, Unseen, Unseen]:
    """Clips for training, for validation and for the test; a video's are validated on what they are trained on.

    Raises:
        FileError: the video is absent, damaged or too short.
    """
    if not config.video:
        clips, _ = draw(config.n_train, "train", torch.arange(float(LENGTH)) / STEP, False)
        return (
            Frames(clips),
            drawn_unseen(max(1, config.n_test // 3), "validation"),
            drawn_unseen(config.n_test, "test"),
        )
    frames = read_video(find(config.video), size=SIZE).frames
    end = round(TRAINING_SHARE * len(frames))
    if end < LENGTH:
        raise FileError(f"A clip takes {LENGTH} frames, there are {end} to train on: take a longer video.")
    clips = frames[:end].unfold(0, LENGTH, 1).movedim(-1, 1)
    return Frames(clips), video_unseen(frames[:end]), video_unseen(frames[end:])


def loss_of(model: WarpODE, clips: Float[Tensor, "B T C H W"], rows: Rows, config: Config) -> dict[str, Tensor]:
    """The loss of a batch of clips: true frames against warped ones, from coarse to fine.

    Every other step takes every other frame as context, so that there are true frames between those that are seen.
    """
    clips = torch.where(rows.rand()[:, None, None, None, None].to(clips) < 0.5, clips.flip(-1), clips)
    if rows.step % 2:
        first = rows.step // 2 % (LENGTH - 2 * CONTEXT + 1)
        stride, seen, asked = 1, range(first, first + CONTEXT), [first + CONTEXT + i for i in range(3)]
    else:
        stride, seen = 2, range(0, 2 * CONTEXT, 2)
        asked = [(1, 3)[rows.step // 2 % 2], 5, 6]
    frames, last = clips[:, list(seen)], seen[-1]
    times = [(i - last) / stride for i in seen]
    levels = model.coefficients(frames, torch.tensor([float(i) for i in seen], device=clips.device))
    fine = model.enlarge(levels[-1], frames)
    size = frames.shape[-2:]
    parts = {"photometric": clips.new_zeros(())}
    for i in asked:
        made = model.render(frames, times, fine, (i - last) / stride)
        unlike = photometric(made, clips[:, i], config.census_weight, halvings=len(levels))
        parts["photometric"] = parts["photometric"] + unlike / len(asked)
    # The last frame from the one before: both are seen, and the coarse levels learn from it, and from the next one.
    coarse = clips.new_zeros(())
    nearest = last + stride
    for finer, level in enumerate(levels):
        small = level.shape[-2:]
        k = size[0] // small[0]
        pictures = {i: F.avg_pool2d(clips[:, i], k) for i in (seen[-2], last, nearest)}
        field = level[:, :, :2] / k
        for source, target, s0, s1 in ((seen[-2], last, -1.0, 0.0), (last, nearest, 0.0, 1.0)):
            made = warp(pictures[source], model.displacement(field, s1, s0))
            unlike = photometric(made, pictures[target], config.census_weight, halvings=finer)
            coarse = coarse + unlike / (2 * len(levels))
    parts["coarse"] = coarse
    velocity = model.velocity(fine, 0.0)[:, :2]
    parts["smoothness"] = edge_aware_smoothness(velocity, frames[:, -1])
    parts["slowness"] = slowness(velocity)
    total = parts["photometric"] + parts["coarse"]
    total = total + config.smoothness * parts["smoothness"]
    if 3 * rows.step > 2 * config.steps:  # what moves must be found before the rest is held
        total = total + config.slowness * parts["slowness"]
    return {"loss": total} | parts


@experiment("flow_warp")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure on unseen clips, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        FileError: the video cannot be read.
        TrainingError: training cannot go on.
    """
    clips, validation, test = data_of(config)
    torch.manual_seed(config.seed)
    model = build_model(config)

    def follow(model: WarpODE, mine: slice) -> dict[str, Tensor]:
        """Next frame's PSNR, the half-way frame's, and the errors of flows, in pixels."""
        some = slice(0, 24)
        context = validation.context[some][mine].to(next(model.parameters()).device)
        made = model.predict(context, torch.arange(float(CONTEXT)), torch.tensor([1.5, 3.0])).cpu().clamp(0, 1)
        found = {
            name: psnr(made[:, i], validation.frames[t][some][mine])
            for i, (name, t) in enumerate((("half_psnr", 1.5), ("next_psnr", 3.0)))
        }
        for name in ("seen", "next") if validation.flows else ():
            flow = model.flow(context, torch.arange(float(CONTEXT)), *FLOWS[name]).cpu()
            true, known = (x[some][mine] for x in validation.flows[name])
            found[f"{name}_error"] = endpoint_error(flow, true, known)
        return found

    done = training.fit(
        model, clips, lambda model, x, rows: loss_of(model, x, rows, config), **config.training(model),
        networks=layers_of(model), folder=folder,
        progress=progress, show="next_psnr", evaluate=follow,
    )  # fmt: skip
    if not done.is_main:
        return None
    metrics = measure(model.eval(), test) | {"parameters": sum(p.numel() for p in model.parameters())}
    stages = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[config.method]
    return results.record(
        "flow_warp", config, metrics, device=choose_device(config.device), wall_time_s=done.seconds,
        evaluations=stages * config.solver_steps, data=checksum(config.video), history=done.history,
    )  # fmt: skip


@torch.no_grad()
def measure(model: WarpODE, test: Unseen, rows: int = 20) -> dict[str, Any]:
    """Figures of a model and of what costs nothing, on unseen clips.

    Returns:
        {"psnr": {time: {method: dB}}, "error": {name of the flow: {method: pixels}}}, the second where flows are known.
    """
    t, device = torch.arange(float(CONTEXT)), next(model.parameters()).device
    times = torch.tensor(sorted(test.frames))
    made, flows = [], {name: [] for name in test.flows}
    for part in test.context.split(rows):
        made.append(model.predict(part.to(device), t, times).cpu().clamp(0, 1))
        for name in flows:
            flows[name].append(model.flow(part.to(device), t, *FLOWS[name]).cpu())
    made, c = torch.cat(made), test.context
    measured: dict[str, Any] = {"psnr": {}, "error": {}}
    for i, at in enumerate(times.tolist()):
        query = torch.tensor([at])
        frames = {"ode": made[:, i], "copy-last": copy_last(c, t, query)[:, 0]}
        if at < CONTEXT - 1:
            frames["cross-fade"] = cross_fade(c, t, query)[:, 0]
        else:
            ahead = at - (CONTEXT - 1)
            frames["extrapolation"] = (c[:, -1] + ahead * (c[:, -1] - c[:, -2])).clamp(0, 1)
        if at in (x[1] for name, x in FLOWS.items() if name in test.flows and x[0] == CONTEXT - 1):
            name = next(name for name, x in FLOWS.items() if x == (CONTEXT - 1, at))
            frames["true flow"] = warp(c[:, -1], test.flows[name][0], mode="bicubic").clamp(0, 1)
        measured["psnr"][f"{at:g}"] = {m: psnr(x, test.frames[at]).mean().item() for m, x in frames.items()}
    for name, found in flows.items():
        true, known = test.flows[name]
        rivals = {"ode": torch.cat(found), "zero": torch.zeros_like(true)}
        measured["error"][name] = {m: endpoint_error(x, true, known).mean().item() for m, x in rivals.items()}
    return measured


if __name__ == "__main__":
    main(Config, run)
