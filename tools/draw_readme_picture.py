"""Draw the README picture from a recorded run: ``python tools/draw_readme_picture.py``."""

import torch

from predoc_lib import figures, results
from predoc_lib.baselines import cross_fade
from predoc_lib.data import moving_digits
from predoc_lib.experiments import latent_ode

model, config = latent_ode.load(results.RESULTS / "latent_ode" / "digits32-2-stride2-ode-seed0")
seen, t = latent_ode.observed_times(config), torch.tensor([-4.0, -2, 0, 1, 3, 4.5, 5, 7, 8, 11, 14, 17])
video = moving_digits(1, n_digits=config.n_digits, canvas=config.canvas, seed=21, split="test")
rows = {
    "truth": video.frames(t),
    "latent ODE": latent_ode.predictor(model, video, seen)(t),
    "cross-fade": cross_fade(video.frames(seen), seen, t),
}
strip = figures.film_strip(
    {name: (x[0, :, 0] * 255).round().byte().numpy() for name, x in rows.items()}, [f"t = {x:g}" for x in t.tolist()]
)
strip.savefig(results.ROOT / "book" / "assets" / "latent_ode.png", dpi=110)
