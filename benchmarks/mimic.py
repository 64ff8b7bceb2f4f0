"""What a critic adds to a training step: ``python benchmarks/mimic.py [--out benchmarks/mimic.json] [--quick]``.

A step of a residual network (torchvision's ResNet-18, 32 images of 64 x 64) and of the book's classifier of digits (256
images of 8 x 8), plain and with one critic on the penultimate layer, in turn; the ratio of their times, the median of
the rounds. ``further`` is the ratio with three steps of the critic for one of the network.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from predoc_lib import results
from predoc_lib.experiments.mimic import Classifier
from predoc_lib.files import whole
from predoc_lib.mimic import MiMIc


def stepper(model: nn.Module, layer: str, images: Tensor, steps: int) -> Callable[[], None]:
    """A training step with so many steps of a critic; 0: no critic."""
    classes = torch.randint(10, (len(images),), device=images.device)
    optimizer = torch.optim.Adam(model.parameters())
    mimic = None
    if steps:
        mimic = MiMIc(model, [layer], example=images)
        mimic.join(optimizer, steps=steps)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), classes)
        if mimic is not None:
            loss = loss + mimic.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def seconds(step: Callable[[], None], n: int) -> float:
    """Of one step, the fastest of n: what else the machine does only makes steps slower."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of one step: does it run?")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds, n = (1, 1) if a.quick else (a.rounds, 10)
    cases = {
        "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), "avgpool", (32, 3, 64, 64)),
        "digits": (lambda: Classifier(1, 8, 16), "penultimate", (256, 1, 8, 8)),
    }
    record = {"device": results.device_name(device), "revision": results.revision(), "torch": torch.__version__}
    record["steps"] = {}
    print(f"{record['device']}\n{'':12}{'plain, ms':>12}{'ratio':>8}{'further':>9}")
    for name, (make, layer, shape) in cases.items():
        images = torch.rand(shape, device=device)
        steppers = [stepper(make().to(device), layer, images, steps) for steps in (0, 1, 3)]
        for step in steppers:
            step()  # what is only done once
        found = [[seconds(step, n) for step in steppers] for _ in range(rounds)]
        row = {
            "plain_ms": 1000 * statistics.median(times[0] for times in found),
            "ratio": statistics.median(times[1] / times[0] for times in found),
            "further": statistics.median(times[2] / times[0] for times in found),
        }
        record["steps"][name] = row
        print(f"{name:12}{row['plain_ms']:12.1f}{row['ratio']:8.2f}{row['further']:9.2f}")
    if a.out:
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
