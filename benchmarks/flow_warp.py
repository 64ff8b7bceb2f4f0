"""How fast ``warp`` is, and how right fitted flows are: ``python benchmarks/flow_warp.py [--out FILE] [--record]``.

1. Warps per second, one thread, beside plain ``grid_sample``: as it is usually called (the grid made of the flow in two
   lines), and alone (with a grid that is there). Each is timed in turn, round after round.
2. The error of fitted flows on the motorcycle and RubberWhale (in the folder that PREDOC_DATA names), of Farneback's
   and of DIS's with OpenCV's usual settings, and the seconds that each takes with one thread.
3. The same on unseen drawn drives, and frames made of these flows, beside the recorded network's; and on real drives,
   whose flow nobody knows.
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from predoc_lib import results
from predoc_lib.data import DataError, catalog, flow_pairs, read_video
from predoc_lib.data.flow_pairs import PAIRS
from predoc_lib.experiments.flow_warp import SIZE, Unseen, drawn_unseen, load, measure, video_unseen
from predoc_lib.files import whole
from predoc_lib.flow_warp import between, fit, invert, warp
from predoc_lib.metrics import endpoint_error, psnr

DATA = {"pairs": tuple(PAIRS.values()), "drives": ("driving",), "highway": ("udacity",)}
SHAPES = ((8, 64), (4, 128), (2, 256), (1, 512))  # images, pixels a side
SETTINGS = (
    "FACTOR", "COARSEST", "BLUR", "WARPS", "REWEIGHTINGS", "ITERATIONS", "EXPONENT", "DATA_EPSILON",
    "SMOOTHNESS_EPSILON", "COLOURS", "GRADIENTS", "SMOOTHNESS", "LIMIT", "REACH", "NEAR", "ALIKE", "HIDDEN",
)  # fmt: skip


def speed(rounds: int) -> dict[str, dict[str, float]]:
    """Warps of an image per second."""
    torch.set_num_threads(1)
    rows = {}
    for mode in ("bilinear", "bicubic"):
        for n, side in SHAPES:
            image, flow = torch.rand(n, 3, side, side), 3 * torch.randn(n, 2, side, side)
            options = {"mode": mode, "padding_mode": "border", "align_corners": True}

            def grid(flow=flow, side=side) -> Tensor:
                y, x = torch.meshgrid(*[torch.arange(float(side))] * 2, indexing="ij")
                return torch.stack([x + flow[:, 0], y + flow[:, 1]], -1) * 2 / (side - 1) - 1

            ready = grid()
            calls = {
                "warp": lambda image=image, flow=flow, mode=mode: warp(image, flow, mode=mode),
                "usual": lambda image=image, grid=grid, options=options: F.grid_sample(image, grid(), **options),
                "alone": lambda image=image, ready=ready, options=options: F.grid_sample(image, ready, **options),
            }
            times = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    call()
                    started = time.perf_counter()
                    call()
                    times[name].append(time.perf_counter() - started)
            per_second = {name: n / statistics.median(t) for name, t in times.items()}
            rows[f"{mode} {n} x {side}"] = per_second
    return rows


def grey(image: Tensor) -> np.ndarray:
    return cv2.cvtColor((image[0] * 255).round().byte().movedim(0, -1).numpy(), cv2.COLOR_RGB2GRAY)


def farneback(image0: Tensor, image1: Tensor) -> Tensor:
    """OpenCV's, with the settings of its tutorial."""
    return _tensor(cv2.calcOpticalFlowFarneback(grey(image0), grey(image1), None, 0.5, 3, 15, 3, 5, 1.2, 0))


def dis(image0: Tensor, image1: Tensor) -> Tensor:
    """OpenCV's, at its medium preset."""
    return _tensor(cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(grey(image0), grey(image1), None))


def _tensor(flow: np.ndarray) -> Tensor:
    return torch.from_numpy(flow).movedim(-1, 0)[None]


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": lambda a, b: torch.zeros_like(a[:, :2]),
    "farneback": farneback,
    "dis": dis,
    "fitted": fit.fit_pair,
}


def pairs() -> dict[str, dict[str, dict[str, float]]]:
    """Errors of the photographs' flows, in pixels, and seconds."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    found = {}
    for name in PAIRS:
        try:
            pair = flow_pairs(name)
        except DataError as error:
            print(f"{name} is left out: {error}")
            continue
        found[name] = {}
        for method, call in METHODS.items():
            started = time.perf_counter()
            flow = call(*pair.batch())
            seconds = time.perf_counter() - started
            row = {"known": endpoint_error(flow, pair.flow[None], pair.known[None]).item(), "seconds": seconds}
            if pair.visible is not None:
                row["visible"] = endpoint_error(flow, pair.flow[None], pair.visible[None]).item()
            found[name][method] = row
            print(name, method, row, flush=True)
    return found


def rivals(test: Unseen) -> dict[str, dict[str, float]]:
    """Of flows between two seen frames: their error, and PSNR of the frame half-way and of the next that they make."""
    found = {}
    for method, call in METHODS.items():
        if method == "zero":
            continue
        rows = {"seen": [], "half_psnr": [], "next_psnr": []}
        for i in range(len(test)):
            earlier, later = test.context[i : i + 1, 1], test.context[i : i + 1, 2]
            flow, back = call(later, earlier), call(earlier, later)
            if test.flows:
                true, known = (x[i : i + 1] for x in test.flows["seen"])
                rows["seen"].append(endpoint_error(flow, true, known))
            rows["half_psnr"].append(psnr(between(earlier, later, back, flow, 0.5), test.frames[1.5][i : i + 1]))
            ahead = invert(-flow)  # constant speed: what will be at p has this flow, and is there after one more of it
            rows["next_psnr"].append(psnr(warp(later, ahead, mode="bicubic").clamp(0, 1), test.frames[3.0][i : i + 1]))
        found[method] = {name: torch.cat(x).mean().item() for name, x in rows.items() if x}
        print(method, found[method], flush=True)
    return found


def network(test: Unseen) -> dict[str, dict[str, float]]:
    """The same of the recorded network, and of what costs nothing."""
    found = measure(load(results.RESULTS / "flow_warp" / "road-seed0")[0], test)
    half, ahead = found["psnr"]["1.5"], found["psnr"]["3"]
    rows = {name: {"half_psnr": half[name], "next_psnr": ahead[name]} for name in ("ode", "copy-last")}
    rows["cross-fade"] = {"half_psnr": half["cross-fade"]}
    for name, value in found["error"].get("seen", {}).items():
        rows.setdefault({"zero": "copy-last"}.get(name, name), {})["seen"] = value
    return rows


def drives(n: int) -> dict[str, dict[str, float]]:
    """On unseen drawn drives."""
    test = drawn_unseen(n, "test")
    return rivals(test) | network(test)


def highway(n: int) -> dict[str, dict[str, dict[str, float]]]:
    """On clips of real drives, every other frame seen; nothing was trained on them."""
    found = {}
    for path in sorted((catalog.require("udacity") / "driving").glob("*.mp4")):
        clips = video_unseen(read_video(path, size=SIZE).frames)
        some = torch.linspace(0, len(clips) - 1, n).round().long()
        test = Unseen(clips.context[some], {t: x[some] for t, x in clips.frames.items()}, {})
        found[path.stem] = rivals(test) | network(test)
    return found


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the fit, the same for every pair."""

    settings: dict[str, float]
    seed: int = 0


def main() -> None:
    """Print ratios, write them as JSON and record the errors if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--only", choices=(*DATA, "speed"), help="one of the parts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", action="store_true", help="also write results/flow_warp/PART")
    a = parser.parse_args()
    device, found = torch.device("cpu"), {}
    parts = {
        "speed": lambda: speed(a.rounds),
        "pairs": pairs,
        "drives": lambda: drives(a.clips),
        "highway": lambda: highway(a.clips // 2),
    }
    for name, call in parts.items():
        if a.only not in (None, name):
            continue
        started = time.perf_counter()
        found[name] = call()
        if a.record and name in DATA:
            config = Settings({setting: getattr(fit, setting) for setting in SETTINGS})
            digests = "".join(catalog.checksum(data) for data in DATA[name])
            rec = results.record(
                "flow_warp", config, found[name], device=device, wall_time_s=time.perf_counter() - started,
                evaluations=1, history=[],
                data={"name": ", ".join(DATA[name]), "sha256": hashlib.sha256(digests.encode()).hexdigest()},
            )  # fmt: skip
            rec["versions"]["opencv-python-headless"] = cv2.__version__
            results.save(results.free_name("flow_warp", name), rec)
    for name, row in found.get("speed", {}).items():
        usual, alone = row["warp"] / row["usual"], row["warp"] / row["alone"]
        print(
            f"{name:18} {row['warp']:8.0f} warps/s   ratio to grid_sample {usual:.2f}, to it with a grid that is there "
            f"{alone:.2f}"
        )
    if a.out:
        record = {"device": results.device_name(device), "revision": results.revision(), "torch": torch.__version__}
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
