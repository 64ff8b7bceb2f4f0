"""What bfloat16 and compilation change: ``python benchmarks/precision.py [--out benchmarks/precision.json] [--quick]``.

The latent ODE's smoke run, once in float32 and once in each other way, same seed and noise, in turn, round after round:
the final loss, which must stay the same within 2 %, and steps a second after the first quarter, which compiles.
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


def smoke(options: dict, change: dict) -> tuple[float, float]:
    """The final loss of a smoke run, and its steps a second after the first quarter."""
    torch.compiler.reset()
    config = build(latent_ode.Config, "smoke", n_test=8, **options, **change)
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
    for _ in range(1 if a.quick else a.rounds):
        for name, options in ways.items():
            found[name].append(smoke(options, change))
    loss, speed = (
        {name: statistics.median(pair[i] for pair in pairs) for name, pairs in found.items()} for i in (0, 1)
    )
    record = {"device": results.device_name(device), "revision": results.revision(), "torch": torch.__version__}
    record["ways"] = {
        name: {
            "loss": loss[name], "loss_ratio": loss[name] / loss["float32"],
            "steps_per_s": speed[name], "speed_ratio": speed[name] / speed["float32"],
        }
        for name in ways
    }  # fmt: skip
    print(f"{record['device']}\n{'':20}{'loss':>10}{'ratio':>8}{'steps/s':>10}{'ratio':>8}")
    for name, row in record["ways"].items():
        print(
            f"{name:20}{row['loss']:10.3f}{row['loss_ratio']:8.4f}{row['steps_per_s']:10.2f}{row['speed_ratio']:8.3f}"
        )
    if a.out:
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
