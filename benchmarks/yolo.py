"""How fast a detector's features are extracted and predicted: ``python benchmarks/yolo.py [--cfg FILE ...]``.

One image at a time, at 320 and 416 pixels a side: OpenCV (its CPU build, Winograd allowed), the network as it is read,
and fused (``Darknet.fused``), on a GPU if there is one. Each is timed in turn, round after round, so that a machine
that slows down slows all of them; both libraries use as many threads. Then a ``FeatureODE`` of the recorded size
predicts six frames' features from three frames', for one video. The weights of a ``.cfg`` without ``.weights`` are
random: they do not change the time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

from predoc_lib import results
from predoc_lib.data import catalog
from predoc_lib.files import whole
from predoc_lib.results import device_name
from predoc_lib.yolo import Darknet
from predoc_lib.yolo.dynamics import FeatureODE

SIZES = (320, 416)
ROAD = results.RESULTS / "yolo_detector/road/detector.cfg"


def opencv(cfg: Path, weights: Path, heads_at: list[int]) -> Callable[[torch.Tensor], list]:
    """OpenCV's extraction of the same features."""
    network = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    network.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    names = network.getLayerNames()
    before = [names[names.index(f"conv_{at}") - 1] for at in heads_at]

    def features(image: torch.Tensor) -> list:
        network.setInput(image.cpu().numpy())
        return network.forward(before)

    return features


def measure(cfg: Path, size: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Frames per second of each, and milliseconds of a prediction."""
    torch.manual_seed(0)
    network, image = Darknet(cfg).eval(), torch.rand(1, 3, size, size, device=device)
    with tempfile.TemporaryDirectory() as folder:
        weights = cfg.with_suffix(".weights")
        if weights.is_file():
            network.load_weights(weights)
        else:
            weights = Path(folder) / "random.weights"
            network.save_weights(weights)
        theirs = opencv(cfg, weights, network.heads_at)
    network = network.to(device)
    fused = network.fused()
    features = fused.features(image)
    assert all(
        abs(a.cpu().numpy() - b).max() < 1e-3 * abs(b).max() for a, b in zip(features, theirs(image), strict=True)
    )
    model = FeatureODE([tuple(x.shape[1:]) for x in features]).to(device).eval()
    context = [x[:, None].expand(-1, 3, -1, -1, -1).contiguous() for x in features]
    seen, ahead = torch.arange(3.0, device=device), torch.arange(3.0, 9.0, device=device)
    calls = {
        "opencv": lambda: theirs(image),
        "as_read": lambda: network.features(image),
        "fused": lambda: fused.features(image),
        "predict_6": lambda: model.predict(context, seen, ahead),
    }
    times = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(each[2:]) for name, each in times.items()}  # the first two warm up
    found = {f"{name}_per_s": 1 / seconds[name] for name in ("opencv", "as_read", "fused")}
    found |= {"ratio": seconds["opencv"] / seconds["fused"], "predict_6_ms": 1000 * seconds["predict_6"]}
    return found | {"predict_6_in_frames": seconds["predict_6"] / seconds["fused"]}


@torch.inference_mode()
def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = sorted((catalog.root() / "yolo").glob("*.cfg"))
    parser.add_argument("--cfg", type=Path, nargs="*", default=[ROAD, *real], help="detectors; else all there are")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cv2.setNumThreads(torch.get_num_threads())
    print(f"{device_name(device)}; OpenCV {cv2.__version__} on {device_name(torch.device('cpu'))}")
    print("Frames/s of extraction, fused against OpenCV (ratio); ms for 6 predicted frames, in frames of extraction")
    columns = ("OpenCV/s", "as read/s", "fused/s", "ratio", "6 frames/ms", "frames")
    print(f"{'detector, side':26}" + "".join(f"{column:>13}" for column in columns))
    rows = {}
    for cfg in a.cfg:
        for size in a.sizes:
            name = f"{'road' if cfg == ROAD else cfg.stem}, {size}"
            row = rows[name] = measure(cfg, size, a.rounds, device)
            print(f"{name:26}" + "".join(f"{value:13.2f}" for value in row.values()), flush=True)
    if a.out:
        made = {"device": device_name(device), "revision": results.revision(), "torch": torch.__version__}
        made |= {"opencv": cv2.__version__, "rounds": a.rounds}
        with whole(a.out) as temporary:
            temporary.write_text(json.dumps(made | {"detectors": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
