"""Fill in what the README takes from recorded runs, its table and its picture: ``python tools/readme.py``."""

import re

import torch

from predoc_lib import figures, results
from predoc_lib.baselines import cross_fade
from predoc_lib.data import moving_digits
from predoc_lib.experiments import latent_ode

README, RUNS = results.ROOT / "README.md", results.RESULTS / "latent_ode"
BLOCK = re.compile(r"(<!-- from results, by tools/readme.py -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = {  # what, command, the recorded run that tells what to expect
    "One training notebook, by hand": ("predoc train latent_ode -p preset=book", "digits32-1-stride1-ode-seed0"),
    "On real data": (
        "predoc train latent_ode -p dataset=mnist -p canvas=64 -p width=192 -p content=48 -p steps=4000",
        "mnist64-1-stride1-ode-seed0",
    ),
    "On a GPU, at the report's size": ("predoc train latent_ode -p preset=thesis -p device=cuda", "mnist64-thesis"),
}


def table() -> str:
    """The README's table of commands, with minutes, device and the figure to expect."""
    rows = []
    for what, (command, run) in COMMANDS.items():
        if (RUNS / run).exists():
            r = results.load(RUNS / run)
            psnr = {method: m["psnr"] for method, m in r["metrics"]["prediction"].items()}
            took = f"{r['wall_time_s'] / 60:.0f} minutes, {r['device']}"
            expect = f"{psnr['ode']:.1f} dB (mean image {psnr['mean image']:.1f}, copy-last {psnr['copy-last']:.1f})"
        else:
            took = expect = "no run is recorded yet"
        rows.append([what, f"`{command}`", took, expect])
    return results.table(["what", "command", "took", "frames 11 to 20"], rows)


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
