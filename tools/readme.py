"""Fill in what the README takes from recorded runs, its table and its picture: ``python tools/readme.py``."""

import dataclasses
import re

import torch

from predoc_lib import figures, results
from predoc_lib.baselines import cross_fade
from predoc_lib.data import moving_digits
from predoc_lib.experiments import latent_ode, msflow
from predoc_lib.experiments.config import build

README, RUNS = results.ROOT / "README.md", results.RESULTS / "latent_ode"
BLOCK = re.compile(r"(<!-- from results, by tools/readme.py -->\n).*?(<!-- end -->)", re.DOTALL)
EXPERIMENTS = {"latent_ode": latent_ode, "msflow": msflow}
COMMANDS = {  # what, and the recorded run that tells what to expect
    "One training notebook, by hand": ("latent_ode", "digits32-1-stride1-ode-seed0"),
    "On real data": ("latent_ode", "mnist64-1-stride1-ode-seed0"),
    "On a GPU": ("msflow", "cifar10_subset-haar-flow_matching-h200"),
}


def command(experiment: str, config: dict) -> str:
    """What makes a run with this config again."""
    book = dataclasses.asdict(build(EXPERIMENTS[experiment].Config, "book"))
    changed = {name: value for name, value in config.items() if value != book[name]} or {"preset": "book"}
    return " ".join([f"predoc train {experiment}", *(f"-p {name}={value}" for name, value in changed.items())])


def figure(experiment: str, metrics: dict) -> str:
    """The figure to expect, beside what is simpler."""
    if experiment == "latent_ode":
        psnr = {method: m["psnr"] for method, m in metrics["prediction"].items()}
        return f"{psnr['ode']:.1f} dB (mean image {psnr['mean image']:.1f}, copy-last {psnr['copy-last']:.1f})"
    m = metrics["test"]
    return f"{m['bits_per_dim']:.2f} bits/dim (Gaussian scale mixture {m['mixture']:.2f}, WebP {m['webp']:.2f})"


def table() -> str:
    """The README's table of commands, with minutes, device and the figure to expect."""
    rows = []
    for what, (experiment, run) in COMMANDS.items():
        r = results.load(results.RESULTS / experiment / run)
        took = f"{r['wall_time_s'] / 60:.0f} minutes, {r['device']}"
        rows.append([what, f"`{command(experiment, r['config'])}`", took, figure(experiment, r["metrics"])])
    return results.table(["what", "command", "took", "figure to expect"], rows)


def filled(text: str) -> str:
    """The README's text with the table in its place."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", text)


def picture() -> None:
    """Draw book/assets/latent_ode.png: one video, true, predicted and cross-faded."""
    model, config = latent_ode.load(RUNS / "digits32-2-stride2-ode-seed0")
    seen, t = latent_ode.observed_times(config), torch.tensor([-4.0, -2, 0, 1, 3, 4.5, 5, 7, 8, 11, 14, 17])
    video = moving_digits(1, n_digits=config.n_digits, canvas=config.canvas, seed=21, split="test")
    rows = {
        "truth": video.frames(t),
        "latent ODE": latent_ode.predictor(model, video, seen)(t),
        "cross-fade": cross_fade(video.frames(seen), seen, t),
    }
    pictures = {name: (x[0, :, 0] * 255).round().byte().numpy() for name, x in rows.items()}
    strip = figures.film_strip(pictures, [f"t = {x:g}" for x in t.tolist()])
    strip.savefig(results.ROOT / "book" / "assets" / "latent_ode.png", dpi=110)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
    picture()
