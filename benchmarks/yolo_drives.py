"""How far other drives move recorded figures: ``python benchmarks/yolo_drives.py [--out FILE] [--record]``.

Two models of ``results/yolo_dynamics`` are measured on sets of unseen drives that no record has measured. What changes
from set to set is due to the drives; all sets as one say best what a model is worth.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from predoc_lib import results
from predoc_lib.experiments import yolo_dynamics
from predoc_lib.experiments.yolo_clips import Unseen, drawn_unseen
from predoc_lib.experiments.yolo_measures import found_by, precisions_of, true_boxes
from predoc_lib.files import whole
from predoc_lib.yolo.dynamics import CopyLast, Extrapolation

RUNS = ("road-ode-seed0", "road-gru-seed0")


@dataclasses.dataclass(frozen=True)
class Settings:
    """So many sets of so many drives, and how many of the split's are skipped because records have measured them."""

    sets: int
    drives: int
    skipped: int
    seed: int = 0


def measure(settings: Settings) -> dict[str, dict]:
    """{"all" or a set's number: {frames ahead: {method: {"map50", "map"}}}}; a model is called "ode" or "gru"."""
    predictors = {"copy-last": CopyLast(), "extrapolation": Extrapolation()}
    for run in RUNS:
        model, network, config = yolo_dynamics.load(results.RESULTS / "yolo_dynamics" / run)
        predictors[config.dynamics] = model
    n, size = settings.skipped + settings.sets * settings.drives, settings.drives
    unseen = drawn_unseen(network, n, "test", skip=settings.skipped)
    figures, everything, every_truth = {}, {}, []
    for i in tqdm(range(settings.sets), desc="sets of drives"):
        part = slice(i * size, (i + 1) * size)
        one = Unseen([x[part] for x in unseen.context], [x[part] for x in unseen.future], unseen.objects[part])
        found = found_by(network, predictors, one)
        truth = true_boxes(one, found["detector"], 0)
        figures[str(i + 1)] = precisions_of(found, truth)
        everything = {name: _longer(everything.get(name), x) for name, x in found.items()}
        every_truth = _longer(every_truth, truth)
    whole = {}
    for name, x in tqdm(everything.items(), desc="all as one"):
        for ahead, row in precisions_of({name: x}, every_truth).items():
            whole.setdefault(ahead, {}).update(row)
    return {"all": whole} | figures


def _longer(lists: list[list] | None, more: list[list]) -> list[list]:
    """Every list made longer by another's."""
    return [a + b for a, b in zip(lists, more, strict=True)] if lists else more


def main() -> None:
    """Print shares of the detector's mAP50, write the figures as JSON and record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--drives", type=int, default=100, help="in a set")
    parser.add_argument("--skipped", type=int, default=300, help="drives that records have measured")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", action="store_true", help="also write results/yolo_dynamics/drives")
    a = parser.parse_args()
    if min(a.sets - 1, a.drives, a.skipped + 1) < 1:
        parser.error("--sets must be at least 2, --drives at least 1 and --skipped at least 0")
    settings, device, started = Settings(a.sets, a.drives, a.skipped), torch.device("cpu"), time.perf_counter()
    revision = results.revision()
    found = measure(settings)
    for time_ahead, methods in found["all"].items():
        for method in methods:
            ratio = {
                name: rows[time_ahead][method]["map50"] / max(rows[time_ahead]["detector"]["map50"], 1e-9)
                for name, rows in found.items()
            }
            all_drives, moved = ratio.pop("all"), np.std(list(ratio.values()), ddof=1)
            print(f"+{time_ahead:4} {method:14} ratio to the detector {all_drives:.3f}; of a set, +- {moved:.3f}")
    if a.record:
        rec = results.record(
            "yolo_dynamics", settings, found, device=device, wall_time_s=time.perf_counter() - started, evaluations=1,
            history=[], data=yolo_dynamics.checksum(""),
        )  # fmt: skip
        results.save(results.free_name("yolo_dynamics", "drives"), rec)
    if a.out:
        record = {"device": results.device_name(device), "revision": revision, "torch": torch.__version__}
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
