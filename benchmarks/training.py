"""What the training loop costs: ``python benchmarks/training.py [--out benchmarks/training.json]``.

Three figures, each a ratio or a time of one run on one machine, for a quiet one:

- overhead: seconds of ``training.fit`` over those of a bare loop with the same model, data and optimizer, at about
  20 ms a step;
- checkpoint: seconds for one checkpoint and the weights beside it, of a 10 MB model with Adam;
- scaling: samples a second of two processes, a core each, over those of one process on one core.

What is compared is timed in turn, round after round, so that a machine that slows down slows all of it.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
from torch.utils.data import DataLoader

from predoc_lib import checkpoint, training
from predoc_lib.data import moving_digits
from predoc_lib.experiments.latent_ode import CONTEXT, FRAMES, Config, build_model
from predoc_lib.files import whole
from predoc_lib.results import device_name

CPU = torch.device("cpu")
TIMES = torch.arange(0.0, FRAMES)
RATE = 1e-3


def loss(model, frames, rows=None):
    """The latent ODE's own, with noise for these rows of the batch."""
    noise = None if rows is None else rows.randn(model.latent_size)
    return model.negative_elbo(frames, TIMES, n_context=CONTEXT, noise=noise)["loss"]


@functools.cache
def videos() -> torch.Tensor:
    """512 of them in memory."""
    return moving_digits(512, canvas=32).frames(TIMES)


def fitted(model, optimizer, batch_size: int, steps: int) -> training.Fitted:
    """Train with ``fit``."""
    return training.fit(
        model, videos(), loss, optimizer, steps=steps, batch_size=batch_size, progress=False, evaluate_every=steps
    )


def bare(model, optimizer, batch_size: int, steps: int) -> None:
    """Train with the loop that everybody writes."""
    done = 0
    while done < steps:
        for frames in DataLoader(videos(), batch_size, shuffle=True, drop_last=True):
            if done == steps:
                break
            optimizer.zero_grad(set_to_none=True)
            loss(model, frames).backward()
            optimizer.step()
            done += 1


def prepared(batch_size: int) -> tuple:
    """The book's latent ODE, untrained, and its optimizer."""
    torch.manual_seed(0)
    model = build_model(Config(batch_size=batch_size))
    return model, torch.optim.Adam(model.parameters(), lr=RATE)


def seconds(train, batch_size: int, steps: int) -> float:
    """How long it takes to train; of ``fit`` the whole call counts, with what it does before and after its loop."""
    model, optimizer = prepared(batch_size)
    started = time.perf_counter()
    train(model, optimizer, batch_size, steps)
    return time.perf_counter() - started


def overhead(rounds: int, steps: int, goal: float = 0.02) -> dict:
    """Ratios of ``fit`` to the bare loop, one a round."""
    for train in (bare, fitted):  # once, to be warm
        seconds(train, 1, 3)
    batch_size = 1
    while seconds(bare, batch_size, 20) / 20 < goal and batch_size < len(videos()):
        batch_size *= 2
    ratios, per_step = [], []
    for i in range(rounds):
        order = [bare, fitted] if i % 2 == 0 else [fitted, bare]  # neither always goes first
        took = {train: seconds(train, batch_size, steps) for train in order}
        ratios.append(took[fitted] / took[bare])
        per_step.append(took[bare] / steps)
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds_a_step": statistics.median(per_step),
        "steps": steps,
        "batch_size": batch_size,
    }


def saving(rounds: int) -> dict:
    """Seconds for a checkpoint and the weights of a model of 10 MB, flushed to the disk, in the current folder."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(2)), torch.nn.Linear(1024, 512))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 1024)).square().mean().backward()
    optimizer.step()
    took = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for step in range(1, rounds + 2):
            started = time.perf_counter()
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "steps": rounds,
                "history": [{"step": step, "loss": 0.5}] * 40, "random": [checkpoint.random_state()], "identity": {},
            }  # fmt: skip
            path = checkpoint.save(Path(folder) / "checkpoints", step, state)
            checkpoint.save_weights(model, Path(folder) / "weights.safetensors")
            took.append(time.perf_counter() - started)
        size = path.stat().st_size
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": statistics.median(took[1:]), "weights_bytes": weights, "checkpoint_bytes": size}


def cores() -> list[int]:
    """A processor of every core that this process may use: two of one core would share what they compute with."""

    def siblings(processor: int) -> str:
        path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        return path.read_text() if path.exists() else str(processor)

    return sorted({siblings(p): p for p in os.sched_getaffinity(0)}.values())


def worker(batch_size: int, steps: int) -> None:
    """One process of a run, on a core of its own; the first one prints the samples a second of all."""
    os.sched_setaffinity(0, {cores()[int(os.environ.get("RANK", 0))]})
    torch.set_num_threads(1)
    fitted(*prepared(batch_size), batch_size, 3)
    done = fitted(*prepared(batch_size), batch_size, steps)
    if done.is_main:
        print(json.dumps(batch_size * steps / done.seconds))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def samples_a_second(processes: int, batch_size: int, steps: int) -> float:
    """Of one run in processes of its own."""
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *several, __file__, "--worker", str(batch_size), str(steps)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def scaling(rounds: int, steps: int, batch_size: int = 32) -> dict:
    """Two processes over one: with the same batch in all (half for each), and with the same batch for each."""
    ways = {"one": (1, batch_size), "same batch": (2, batch_size), "same batch a process": (2, 2 * batch_size)}
    speeds = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: 1 if i % 2 == 0 else -1]:  # none always goes first
            speeds[name].append(samples_a_second(*ways[name], steps))
    alone = speeds.pop("one")
    ratios = {name: [two / one for two, one in zip(found, alone, strict=True)] for name, found in speeds.items()}
    return {"one_process": statistics.median(alone), "batch_size": batch_size, "steps": steps} | {
        name: {"ratio": statistics.median(found), "ratios": found} for name, found in ratios.items()
    }


def main() -> None:
    """Print what was measured, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(*a.worker)
        return
    if len(cores()) < 2:
        sys.exit("The scaling of two processes wants two cores, and there is one.")
    torch.set_num_threads(1)
    record = {
        "device": device_name(CPU),
        "cores": len(cores()),
        "load_before": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    }
    print(f"{record['device']}, {record['cores']} cores, load {record['load_before']:.2f} before")
    record["overhead"] = found = overhead(a.rounds, a.steps)
    print(
        f"overhead: fit takes {found['ratio']:.3f} of a bare loop's time at {1000 * found['seconds_a_step']:.1f} ms a "
        f"step ({min(found['ratios']):.3f} to {max(found['ratios']):.3f} in {a.rounds} rounds)"
    )
    record["checkpoint"] = found = saving(4 * a.rounds)
    print(
        f"checkpoint: {1000 * found['seconds']:.0f} ms for {found['weights_bytes'] / 1e6:.1f} MB of weights "
        f"({found['checkpoint_bytes'] / 1e6:.1f} MB with Adam's state, and the weights again)"
    )
    record["scaling"] = found = scaling(max(1, a.rounds // 2), a.steps)
    for name in ("same batch", "same batch a process"):
        ratio, span = found[name]["ratio"], f"{min(found[name]['ratios']):.2f} to {max(found[name]['ratios']):.2f}"
        print(f"scaling, {name}: two processes reach {ratio:.2f} times the samples a second of one ({span})")
    if a.out:
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
