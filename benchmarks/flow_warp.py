"""How fast ``warp`` is, and how right fitted flows are: ``python benchmarks/flow_warp.py [--out FILE] [--record]``.

1. Warps per second, one thread, beside plain ``grid_sample``: as it is usually called (the grid made of the flow in two
   lines), and alone (with a grid that is there). Each is timed in turn, round after round.
2. The error of fitted flows on the motorcycle and RubberWhale (in the folder that PREDOC_DATA names), of Farneback's
   and of DIS's with OpenCV's usual settings, and the seconds that each takes with one thread.
3. The same on unseen drawn drives, and frames made of these flows, as the recorded network's are measured.
"""

import argparse
import dataclasses
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
from predoc_lib.data import DataError, catalog, flow_pairs
from predoc_lib.data.flow_pairs import PAIRS
from predoc_lib.experiments.flow_warp import FLOWS, drawn_unseen
from predoc_lib.files import whole
from predoc_lib.flow_warp import between, fit, invert, warp
from predoc_lib.metrics import endpoint_error, psnr

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


def drives(n: int) -> dict[str, dict[str, float]]:
    """On drawn drives: the error of the flow between two seen frames, PSNR of the frame half-way and of the next."""
    test, t1, half, t3 = drawn_unseen(n, "test"), 1.0, 1.5, 3.0
    true, known = test.flows["seen"]
    assert FLOWS["seen"] == (t1, 2.0)
    found = {}
    for method, call in METHODS.items():
        if method == "zero":
            continue
        rows = {"seen": [], "half_psnr": [], "next_psnr": []}
        for i in range(len(test)):
            earlier, later = test.context[i : i + 1, 1], test.context[i : i + 1, 2]
            flow, back = call(later, earlier), call(earlier, later)
            rows["seen"].append(endpoint_error(flow, true[i : i + 1], known[i : i + 1]))
            rows["half_psnr"].append(psnr(between(earlier, later, back, flow, 0.5), test.frames[half][i : i + 1]))
            ahead = invert(-flow)  # constant speed: what will be at p has this flow, and is there after one more of it
            rows["next_psnr"].append(psnr(warp(later, ahead, mode="bicubic").clamp(0, 1), test.frames[t3][i : i + 1]))
        found[method] = {name: torch.cat(x).mean().item() for name, x in rows.items()}
        print("drives", method, found[method], flush=True)
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
    parser.add_argument("--drives", type=int, default=20)
    parser.add_argument("--only", choices=("speed", "pairs", "drives"), help="one of the three")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", action="store_true", help="also write results/flow_warp/pairs")
    a = parser.parse_args()
    started, device = time.perf_counter(), torch.device("cpu")
    parts = {"speed": lambda: speed(a.rounds), "pairs": pairs, "drives": lambda: drives(a.drives)}
    found = {name: call() for name, call in parts.items() if a.only in (None, name)}
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
    if a.record:
        config = Settings({name: getattr(fit, name) for name in SETTINGS})
        rec = results.record(
            "flow_warp", config, found, device=device, wall_time_s=time.perf_counter() - started, evaluations=1,
            data={"name": "motorcycle, rubber_whale, driving", "sha256": catalog.checksum("motorcycle")}, history=[],
        )  # fmt: skip
        rec["versions"]["opencv-python-headless"] = cv2.__version__
        results.save(results.free_name("flow_warp", "pairs"), rec)


if __name__ == "__main__":
    main()
