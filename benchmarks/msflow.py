"""What MSFlow costs: ``python benchmarks/msflow.py [--out benchmarks/msflow.json] [--quick]``.

Images a second of a training step, for both objectives, one and three scales (the single scale as wide as makes it as
large), in float32, bfloat16 and compiled; of an evaluation; what a step keeps for its backward pass; and how all this
grows with the images' side and with the number of scales. What is compared is timed in turn, round after round.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import time
from pathlib import Path

import torch

from predoc_lib import results
from predoc_lib.data import photos
from predoc_lib.experiments.config import build
from predoc_lib.experiments.msflow import Config, build_model, evaluate
from predoc_lib.files import whole
from predoc_lib.measure import bytes_kept
from predoc_lib.msflow import MSFlow
from predoc_lib.precision import lower_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def size(model: MSFlow) -> int:
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def made(**options) -> MSFlow:
    """An untrained model whose fields are no trivial ones, on the device."""
    torch.manual_seed(0)
    model = build_model(build(Config, "book", **options))
    with torch.no_grad():
        for flow in model.flows:
            torch.nn.init.normal_(flow.f.net.leave.weight, std=0.02)
    model.whiten(photos(1000, options["image_size"]))
    model.trained.fill_(True)
    return model.to(DEVICE)


def as_large(weights: int, **options) -> MSFlow:
    """The narrowest model with as many parameters."""
    return next(m for m in (made(width=width, **options) for width in range(16, 400, 4)) if size(m) >= weights)


def step(model: MSFlow, images: torch.Tensor, objective: str, precision: str = "float32") -> None:
    """Loss and gradients of one batch."""
    model.zero_grad(set_to_none=True)
    with lower_precision(model.networks, precision, DEVICE.type):
        model.loss(images, objective).backward()


def in_turn(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of every call."""
    taken = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i:  # the first one warms up
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def table(title: str, rows: dict[str, dict]) -> None:
    """Print rows, with the ratio of images a second to the first."""
    first = next(iter(rows.values()))["images_per_s"]
    print(f"\n{title}\n{'':44}{'parameters':>11}{'images/s':>10}{'ratio':>8}{'kept MB':>9}{'evaluations':>12}")
    for name, row in rows.items():
        print(
            f"{name:44}{row['parameters']:11,}{row['images_per_s']:10.1f}{row['images_per_s'] / first:8.3f}"
            f"{row.get('bytes_kept', 0) / 1e6:9.1f}{row.get('evaluations', 1):12}"
        )


def training(side: int, batch: int, rounds: int, compiled: bool) -> dict[str, dict]:
    """One training step: objectives, scales, precisions, compiled or not."""
    images = photos(batch, side).to(DEVICE)
    three = made(image_size=side, scales=3)
    models = {"three scales": three, "one scale": as_large(size(three), image_size=side, scales=1)}
    calls, rows = {}, {}
    for objective in ("flow_matching", "likelihood"):
        for name, model in models.items():
            for precision in ("float32", "bfloat16"):
                title = f"{objective.replace('_', ' ')}, {name}, {precision}"
                calls[title] = lambda m=model, o=objective, p=precision: step(m, images, o, p)
                rows[title] = {"parameters": size(model)}
                with lower_precision(model.networks, precision, DEVICE.type):
                    kept = bytes_kept(lambda m=model, o=objective: m.loss(images, o), DEVICE)
                rows[title] |= {"bytes_kept": kept}
                if objective == "likelihood":
                    rows[title]["evaluations"] = sum(flow.stats["evaluations"] for flow in model.flows)
    if compiled:
        model = made(image_size=side, scales=3)
        for flow in model.flows:
            flow.f.compile(mode="reduce-overhead")  # as in training; on a GPU, CUDA graphs
        title = "flow matching, three scales, compiled"
        calls[title], rows[title] = lambda: step(model, images, "flow_matching"), {"parameters": size(model)}
    for title, seconds in in_turn(calls, rounds).items():
        rows[title]["images_per_s"] = batch / seconds
    return rows


def growth(cases: dict[str, dict], batch: int, rounds: int) -> dict[str, dict]:
    """Flow matching's step and the evaluation, case by case."""
    calls, rows = {}, {}
    for name, options in cases.items():
        model, images = made(**options), photos(batch, options["image_size"]).to(DEVICE)
        kept = bytes_kept(lambda m=model, x=images: m.loss(x, "flow_matching"), DEVICE)
        for what, call in (
            ("step", lambda m=model, x=images: step(m, x, "flow_matching")),
            ("density", lambda m=model, x=images: evaluate(m, x, tolerance=1e-3)),
        ):
            calls[f"{name}, {what}"] = call
            rows[f"{name}, {what}"] = {"parameters": size(model)} | ({"bytes_kept": kept} if what == "step" else {})
    for title, seconds in in_turn(calls, rounds).items():
        rows[title]["images_per_s"] = batch / seconds
    return rows


def main() -> None:
    """Print the tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small images, one round: does it run?")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    side, batch, rounds = (8, 2, 1) if a.quick else (16, a.batch_size, a.rounds)
    compiled = not a.quick and (DEVICE.type == "cuda" or shutil.which("g++") is not None)
    sides, scales = ((8, 16), (1, 2)) if a.quick else ((8, 16, 32, 64), (1, 2, 3, 4))
    record = {"device": results.device_name(DEVICE), "revision": results.revision(), "torch": torch.__version__}
    print(record["device"] + ("" if compiled or a.quick else "; nothing is compiled: there is no g++"))
    tables = {
        f"training step, {side} x {side}, batch {batch}": lambda: training(side, batch, rounds, compiled),
        f"three scales, by the side, batch {batch}": lambda: growth(
            {f"{s} x {s}": {"image_size": s, "scales": 3} for s in sides}, batch, rounds
        ),
        f"{sides[-2]} x {sides[-2]}, by the scales, batch {batch}": lambda: growth(
            {f"{n} scales": {"image_size": sides[-2], "scales": n} for n in scales},
            batch,
            rounds,
        ),
    }
    for title, call in tables.items():
        record[title] = call()
        table(title, record[title])
    if a.out:
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
