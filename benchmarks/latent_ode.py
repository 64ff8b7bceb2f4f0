"""What the latent ODE's solvers cost and miss, in one run: ``python benchmarks/latent_ode.py [--out FILE]``.

The model is a recorded one (what an adaptive solver costs depends on the field). Each solver is timed in turn, round
after round, so that a machine that slows down slows all of them. Memory is what the forward pass keeps for the backward
pass, and the peak of the whole training step. The error is the largest difference of a pixel, at the times of
training, from a solve in float64 at tolerance 1e-10.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler speaks between the rows

import torch

from predoc_lib import results
from predoc_lib.data import moving_digits
from predoc_lib.experiments.latent_ode import FRAMES, build_model, load, observed_times
from predoc_lib.files import whole
from predoc_lib.measure import bytes_kept, peak_bytes
from predoc_lib.results import device_name

MODEL = "digits32-2-stride2-ode-seed0"
SOLVERS = {
    "rk4, 1 frame a step": {"method": "rk4"},
    "rk4, 2 frames a step": {"method": "rk4", "step_size": 2.0},
    "rk4, adjoint": {"method": "rk4", "adjoint": True},
    "dopri5, 1e-4": {"method": "dopri5"},
    "dopri5, 1e-4, adjoint": {"method": "dopri5", "adjoint": True},
}


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, config = load(results.RESULTS / "latent_ode" / MODEL)
    t, seen = torch.arange(0.0, FRAMES, config.stride, device=device), observed_times(config).to(device)
    videos = moving_digits(a.batch_size, n_digits=config.n_digits, canvas=config.canvas, split="test")
    frames = videos.frames(t.cpu()).to(device)
    context, query = frames[:, : len(seen)], torch.arange(0, FRAMES, 0.5, device=device)

    def with_solver(**options):
        model = build_model(dataclasses.replace(config, **options))
        model.load_state_dict(trained.state_dict())
        return model.to(device)

    def timed(call) -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.no_grad():
        exact = with_solver(method="dopri5", tolerance=1e-10).double()
        truth = exact.predict(context.double(), seen.double(), t.double())
    calls = {}
    for name, options in SOLVERS.items():
        model = with_solver(**options)

        def forward(model=model) -> torch.Tensor:
            return model.negative_elbo(frames, t, n_context=len(seen))["loss"]

        def train(model=model, forward=forward) -> None:
            model.zero_grad(set_to_none=True)
            forward().backward()

        @torch.no_grad()
        def decode(model=model) -> torch.Tensor:
            return model.predict(context, seen, query)

        calls[name] = (train, decode, forward, model)
    for train, decode, *_ in calls.values():
        train(), decode()
    times = {name: ([], []) for name in calls}
    for _ in range(a.rounds):
        for name, (train, decode, *_) in calls.items():
            times[name][0].append(timed(train))
            times[name][1].append(timed(decode))
    rows = {}
    for name, (train, _, forward, model) in calls.items():
        seconds = [statistics.median(x) for x in times[name]]
        with torch.no_grad():
            error = (model.predict(context, seen, t) - truth).abs().max().item()
        rows[name] = {
            "videos_per_s_training": a.batch_size / seconds[0],
            "videos_per_s_decoding": a.batch_size / seconds[1],
            "bytes_kept": bytes_kept(forward, device),
            "bytes_peak": peak_bytes(train, device),
            "largest_error": error,
        }
        forward()
        rows[name]["evaluations"] = model.stats["evaluations"]
    base = next(iter(rows.values()))
    print(f"{device_name(device)}, {MODEL}, batch {a.batch_size}; in brackets: ratios to the first row")
    columns = {"train videos/s": ("videos_per_s_training", 1), "decode videos/s": ("videos_per_s_decoding", 1)}
    columns |= {"kept MB": ("bytes_kept", 1e6), "peak MB": ("bytes_peak", 1e6)}
    print(f"{'solver':22}" + "".join(f"{column:>20}" for column in columns) + f"{'evaluations':>13}{'error':>10}")
    for name, row in rows.items():
        cells = (f"{row[k] / unit:12.1f} ({row[k] / base[k]:5.2f})" for k, unit in columns.values())
        print(f"{name:22}" + "".join(cells) + f"{row['evaluations']:13}{row['largest_error']:10.1e}")
    if a.out:
        record = {"device": device_name(device), "model": MODEL, "batch_size": a.batch_size, "rounds": a.rounds}
        record |= {"revision": results.revision(), "torch": torch.__version__, "solvers": rows}
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
