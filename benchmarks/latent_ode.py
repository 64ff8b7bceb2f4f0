"""Speed and memory of the latent ODE's solvers, as ratios in one run: ``python benchmarks/latent_ode.py [--out FILE]``.

Each solver is timed in turn, round after round, so that a machine that slows down slows all of them. Memory is what a
training step keeps for its backward pass: counted with saved-tensor hooks on a CPU, by the allocator on a GPU.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

from predoc_lib.data import moving_digits
from predoc_lib.experiments.latent_ode import CONTEXT, FRAMES, Config, build_model, observed_times
from predoc_lib.measure import bytes_kept
from predoc_lib.results import device_name

SOLVERS = {
    "rk4, 1 frame a step": {"method": "rk4", "adjoint": False},
    "rk4, adjoint": {"method": "rk4", "adjoint": True},
    "dopri5, 1e-4": {"method": "dopri5", "adjoint": False},
    "dopri5, 1e-4, adjoint": {"method": "dopri5", "adjoint": True},
}


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canvas", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(n_digits=2, canvas=a.canvas, batch_size=a.batch_size)
    t, seen = torch.arange(0.0, FRAMES, device=device), observed_times(config).to(device)
    frames = moving_digits(a.batch_size, n_digits=2, canvas=a.canvas).frames(t.cpu()).to(device)
    query = torch.arange(0, FRAMES, 0.5, device=device)

    def timed(call) -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    calls = {}
    for name, options in SOLVERS.items():
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(config, **options)).to(device)

        def forward(model=model) -> torch.Tensor:
            return model.negative_elbo(frames, t, n_context=CONTEXT)["loss"]

        def train(model=model, forward=forward) -> None:
            model.zero_grad(set_to_none=True)
            forward().backward()

        @torch.no_grad()
        def decode(model=model) -> None:
            model.predict(frames[:, :CONTEXT], seen, query)

        calls[name] = (train, decode, forward, model)
    for train, decode, *_ in calls.values():
        train(), decode()
    times = {name: ([], []) for name in calls}
    for _ in range(a.rounds):
        for name, (train, decode, *_) in calls.items():
            times[name][0].append(timed(train))
            times[name][1].append(timed(decode))
    rows = {}
    for name, (_, _, forward, model) in calls.items():
        seconds = [statistics.median(x) for x in times[name]]
        memory = bytes_kept(forward, device)
        rows[name] = {
            "videos_per_s_training": a.batch_size / seconds[0],
            "videos_per_s_decoding": a.batch_size / seconds[1],
            "bytes_kept": memory,
            "evaluations": model.stats["evaluations"],
        }
    base = next(iter(rows.values()))
    print(f"{device_name(device)}, batch {a.batch_size}, {a.canvas} x {a.canvas}; ratios to the first row")
    columns = ("train videos/s", "decode videos/s", "kept MB")
    print(f"{'solver':24}" + "".join(f"{column:>17}{'ratio':>7}" for column in columns))
    for name, row in rows.items():
        ratio = {k: row[k] / base[k] for k in row}
        print(
            f"{name:24}{row['videos_per_s_training']:17.0f}{ratio['videos_per_s_training']:7.2f}"
            f"{row['videos_per_s_decoding']:17.0f}{ratio['videos_per_s_decoding']:7.2f}"
            f"{row['bytes_kept'] / 1e6:17.1f}{ratio['bytes_kept']:7.2f}"
        )
    if a.out:
        record = {"device": device_name(device), "canvas": a.canvas, "batch_size": a.batch_size, "solvers": rows}
        a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
