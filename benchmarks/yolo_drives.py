"""How far other drives move recorded figures: ``python benchmarks/yolo_drives.py [--out FILE] [--record]``.

Two models of ``results/yolo_dynamics`` are measured on sets of unseen drives, by default on such as no other record
measures. What changes from set to set is due to the drives; the sets as one give a model's figure.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from predoc_lib import results
from predoc_lib.experiments import yolo_dynamics
from predoc_lib.experiments.yolo_clips import drawn_unseen
from predoc_lib.experiments.yolo_measures import detected, precisions_of, predicted, tracked, true_boxes
from predoc_lib.files import whole
from predoc_lib.yolo.dynamics import CopyLast, Extrapolation

MEASURED = (1 + yolo_dynamics.ASIDE) * yolo_dynamics.Config().n_test  # drives, by the records


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which recorded runs, and on how many sets of how many drives, after the first ``skipped`` of the split.

    When a drive starts depends on how many there are in all, so that other numbers give other clips.
    """

    runs: tuple[str, ...] = ("road-ode-seed0", "road-gru-seed0")
    sets: int = 10
    drives: int = 100
    skipped: int = MEASURED
    seed: int = 0


def measure(settings: Settings) -> dict[str, dict]:
    """{"all" or a set's number: {frames ahead: {method: {"map50", "map"}}}}; a model is called "ode" or "gru"."""
    predictors = {"copy-last": CopyLast(), "extrapolation": Extrapolation()}
    for run in settings.runs:
        model, network, config = yolo_dynamics.load(results.RESULTS / "yolo_dynamics" / run)
        predictors[config.dynamics] = model
    n, size = settings.skipped + settings.sets * settings.drives, settings.drives
    unseen = drawn_unseen(network, n, "test", skip=settings.skipped)
    # What found_by finds, one method at a time, so that the bar moves.
    methods = {name: functools.partial(predicted, network, predictor, unseen) for name, predictor in predictors.items()}
    methods |= {
        "detector": functools.partial(detected, network, unseen.future),
        "tracked": functools.partial(tracked, network, unseen),
    }
    found = {name: method() for name, method in tqdm(methods.items(), desc="finding boxes")}
    truth = true_boxes(unseen, found["detector"], 0)
    parts = {"all": slice(None)} | {str(i + 1): slice(i * size, (i + 1) * size) for i in range(settings.sets)}
    return {
        name: precisions_of({method: [at[part] for at in x] for method, x in found.items()}, [at[part] for at in truth])
        for name, part in tqdm(parts.items(), desc="mAP")
    }


def main() -> None:
    """Print shares of the detector's mAP50, write the figures as JSON and record them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=Settings.sets)
    parser.add_argument("--drives", type=int, default=Settings.drives, help="in a set")
    parser.add_argument("--skipped", type=int, default=Settings.skipped, help="drives before the first set")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", action="store_true", help="also write results/yolo_dynamics/drives")
    a = parser.parse_args()
    if min(a.sets - 1, a.drives, a.skipped + 1) < 1:
        parser.error("--sets must be at least 2, --drives at least 1 and --skipped at least 0")
    if a.record and (results.RESULTS / "yolo_dynamics" / "drives").exists():
        parser.error("results/yolo_dynamics/drives is there already: remove it to record it anew")
    settings = Settings(sets=a.sets, drives=a.drives, skipped=a.skipped)
    device, started = torch.device("cpu"), time.perf_counter()
    results.revision()  # of the code that runs
    found = measure(settings)
    for ahead, methods in found["all"].items():
        for method in methods:
            ratio = {
                name: rows[ahead][method]["map50"] / max(rows[ahead]["detector"]["map50"], 1e-9)
                for name, rows in found.items()
            }
            of_all, moved = ratio.pop("all"), np.std(list(ratio.values()), ddof=1)
            print(f"+{ahead:4} {method:14} ratio to the detector {of_all:.3f}; of a set, +- {moved:.3f}")
    if a.out:
        record = {
            "device": results.device_name(device), "revision": results.revision(), "torch": torch.__version__,
            "settings": dataclasses.asdict(settings),
        }  # fmt: skip
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record | found, indent=1) + "\n")
    if a.record:
        rec = results.record(
            "yolo_dynamics", settings, found, device=device, wall_time_s=time.perf_counter() - started, evaluations=1,
            history=[], data=yolo_dynamics.checksum(""),
        )  # fmt: skip
        results.save(results.free_name("yolo_dynamics", "drives"), rec)


if __name__ == "__main__":
    main()
