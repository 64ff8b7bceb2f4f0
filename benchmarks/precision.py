"""What bfloat16 and compilation change: ``python benchmarks/precision.py [--out benchmarks/precision.json] [--quick]``.

The latent ODE's smoke run, once in float32 and once in each other way, same seed and noise, in turn; every round has
its own seed. The final loss must stay the same within 2 %; steps a second count after the first quarter, which
compiles.
"""

import argparse
import contextlib
import json
import shutil
import statistics
from pathlib import Path

import torch

from predoc_lib import results
from predoc_lib.experiments import latent_ode
from predoc_lib.experiments.config import build
from predoc_lib.files import whole

WAYS = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "compiled": {"compile": True},
    "bfloat16, compiled": {"precision": "bfloat16", "compile": True},
}
RATE = 5e-4  # at the preset's own, 40 steps are chaotic: another order of sums moves the final loss by percents


def smoke(options: dict, change: dict) -> tuple[float, float]:
    """The final loss of a smoke run, and its steps a second after the first quarter."""
    torch.compiler.reset()
    config = build(latent_ode.Config, "smoke", n_test=8, learning_rate=RATE, **options, **change)
    history = latent_ode.run(config, progress=False)["history"]
    first, last = history[0], history[-1]
    return last["loss"], (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small batches, one round: does it run?")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    can_compile = not a.quick and (device.type == "cuda" or shutil.which("g++") is not None)
    ways = {name: options for name, options in WAYS.items() if can_compile or "compile" not in options}
    change = {"batch_size": 2} if a.quick else {}
    found = {name: [] for name in ways}
    for seed in range(1 if a.quick else a.rounds):
        for name, options in ways.items():
            found[name].append(smoke(options, change | {"seed": seed}))
    record = {"device": results.device_name(device), "revision": results.revision(), "torch": torch.__version__}
    record["ways"] = {}
    for name, pairs in found.items():
        ratios = [loss / own for (loss, _), (own, _) in zip(pairs, found["float32"], strict=True)]
        speeds = [speed / own for (_, speed), (_, own) in zip(pairs, found["float32"], strict=True)]
        record["ways"][name] = {
            "loss_ratios": ratios,
            "steps_per_s": statistics.median(speed for _, speed in pairs),
            "speed_ratio": statistics.median(speeds),
        }
    print(f"{record['device']}\n{'':20}{'steps/s':>10}{'ratio':>8}   loss ratios")
    for name, row in record["ways"].items():
        ratios = "".join(f"{ratio:8.4f}" for ratio in row["loss_ratios"])
        print(f"{name:20}{row['steps_per_s']:10.2f}{row['speed_ratio']:8.3f}   {ratios}")
    if a.out:
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
