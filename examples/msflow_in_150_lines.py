"""MSFlow by flow matching in one file, on torch alone: ``python examples/msflow_in_150_lines.py [steps]``.

An image is split into orthonormal Haar bands. Each band, given the coarser image, has a continuous normalizing flow of
its own: a field f(t, y, coarse) that carries it from data at t = 0 to Gaussian noise at t = 1. Trained on five
photographs (2000 steps, two minutes), it prints bits/dim on two others and writes samples to msflow.png.
"""

import math
import sys
import time

import skimage.data  # the photographs come with these two
import sklearn.datasets
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

SIDE, SCALES, WIDTH, BATCH, RATE, EMA, STEPS = 16, 3, 48, 128, 5e-3, 0.99, 32


def photographs():
    """Pictures [3, H, W] for training, and for the test; levels 0 to 255, at half their size."""
    load, stereo = sklearn.datasets.load_sample_image, skimage.data.stereo_motorcycle()[0]
    train = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), stereo, load("china.jpg")]
    sets = (train, [skimage.data.chelsea(), load("flower.jpg")])
    return [[F.avg_pool2d(torch.tensor(p).movedim(-1, 0).float(), 2).round() for p in pictures] for pictures in sets]


def crop(p, augment):
    """Any part [3, SIDE, SIDE] of a picture; augmented: flipped, transposed, every second one recoloured."""
    y, x = (int(torch.randint(size - SIDE + 1, ())) for size in p.shape[1:])
    p = p[:, y : y + SIDE, x : x + SIDE]
    if not augment:
        return p
    for change in (lambda p: p.flip(1), lambda p: p.flip(2), lambda p: p.transpose(1, 2)):
        p = change(p) if torch.rand(()) < 0.5 else p
    contrast, brightness, dither = 0.75 + torch.rand(3, 1, 1) / 2, 60 * torch.rand(3, 1, 1) - 30, torch.rand(p.shape)
    return p if torch.rand(()) < 0.5 else (p * contrast + brightness + dither).clamp(0, 255).floor()


def crops(pictures, n, augment=True):
    """n of them, the pictures in turn."""
    return torch.stack([crop(pictures[i % len(pictures)], augment) for i in range(n)])


def split(x):
    """One orthonormal Haar step: twice the mean of every 2 x 2 pixels, and three details of each."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


def merge(x, details):
    """The inverse of split: its transpose."""
    h, v, d = details.chunk(3, 1)
    rows = torch.stack([x + h + v + d, x - h + v - d], -1), torch.stack([x + h - v - d, x - h - v + d], -1)
    return torch.stack([row.flatten(-2) for row in rows], -2).flatten(-3, -2) / 2


def bands(levels):
    """Levels, dequantized and in [-1, 1] -> [(band, coarser image or None)], coarsest first. |det| = 128^-D."""
    x, found = (levels + torch.rand_like(levels)) / 128 - 1, []
    for _ in range(SCALES - 1):
        x, details = split(x)
        found.insert(0, (details, x))
    return [(x, None), *found]


class Scale(nn.Module):
    """The flow of one band: a fixed whitening of its channels, and a field that infers mean and scale of the data."""

    def __init__(self, band, coarse):
        super().__init__()
        rows = band.movedim(1, -1).flatten(0, -2)
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("factor", torch.linalg.cholesky(rows.T.cov()))
        self.register_buffer("unit", torch.ones(()) if coarse is None else coarse.std())
        c, seen = rows.shape[1], 2 * (rows.shape[1] + (0 if coarse is None else 3))
        self.clock = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 8 * WIDTH))
        self.enter, self.leave = nn.Conv2d(seen, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2 * c, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(4))
        for layer in (self.leave, *self.inner[1::2]):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def white(self, band):
        return torch.einsum("ij,bjhw->bihw", self.factor.inverse(), band - self.mean[:, None, None])

    def black(self, y):
        return torch.einsum("ij,bjhw->bihw", self.factor, y) + self.mean[:, None, None]

    def forward(self, t, y, coarse):
        """dy/dt: right if y(0) is N(mu, sigma^2), both said by a small residual network; t is [B] or [1]."""
        s, waves = t.view(-1, 1, 1, 1), torch.arange(1, 9) * math.pi / 2
        phase = torch.cat([t[:, None] * waves, (t[:, None] ** 2 + 1e-4).log() / 9.2 * waves], 1)
        film = self.clock(torch.cat([phase.sin(), phase.cos()], 1))[..., None, None].chunk(8, 1)
        seen = [y / ((1 - s) ** 2 + s**2).sqrt(), (y / (s**2 + 1e-3).sqrt()).asinh()]
        if coarse is not None:
            near = coarse - F.avg_pool2d(coarse, 3, 1, 1, count_include_pad=False)
            seen += [coarse / self.unit, (near / self.unit * 30).asinh()]
        h = self.enter(torch.cat(seen, 1))
        for i in (0, 2):
            h = h + self.inner[i + 1](F.silu(self.inner[i](F.silu(h)) * (1 + film[i]) + film[i + 1]))
        mu, log_sigma = self.leave(F.silu(h)).chunk(2, 1)
        square = (8 * (log_sigma / 4).tanh()).exp()
        return ((s - (1 - s) * square) * y - s * mu) / ((1 - s) ** 2 * square + s**2)

    def loss(self, band, coarse):
        """Flow matching: velocities of straight lines from data to noise, errors weighted by (1 - t) / (t + 0.3)."""
        y, noise, t = self.white(band), torch.randn_like(band), 0.3 * ((1 + 1 / 0.3) ** torch.rand(len(band)) - 1)
        s = t.view(-1, 1, 1, 1)
        return ((1 - s) * (self(t, (1 - s) * y + s * noise, coarse) - (noise - y)).square()).mean()

    def solve(self, y, coarse, times, probe):
        """y after the last time, and the integral of its divergence (Hutchinson's estimate), by RK4."""

        def f(t, y):
            with torch.enable_grad():
                dy = self(t[None], y.requires_grad_(), coarse)
                return dy.detach(), (torch.autograd.grad(dy, y, probe)[0] * probe).flatten(1).sum(1)

        total = torch.zeros(len(y))
        for a, b in times.unfold(0, 2, 1):
            h, m = b - a, (a + b) / 2
            k = [f(a, y)]
            for t, part in ((m, h / 2), (m, h / 2), (b, h)):
                k.append(f(t, y.detach() + part * k[-1][0]))
            dy, change = ((p + 2 * q + 2 * r + w) * h / 6 for p, q, r, w in zip(*k, strict=True))
            y, total = y.detach() + dy, total + change
        return y, total


@torch.no_grad()
def bits_per_dim(scales, levels, steps=STEPS):
    """-log2 p of images [B, 3, SIDE, SIDE], per number in one: the change of variables, band by band."""
    nats = torch.full((len(levels),), -levels[0].numel() * math.log(128))
    for scale, (band, coarse) in zip(scales, bands(levels), strict=True):
        probe = (torch.rand_like(band) < 0.5) * 2.0 - 1
        noise, change = scale.solve(scale.white(band), coarse, torch.linspace(0, 1, steps + 1) ** 2, probe)
        nats += change - 0.5 * (noise.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        nats -= scale.factor.diagonal().log().sum() * band.shape[-1] ** 2
    return -nats / (levels[0].numel() * math.log(2))


@torch.no_grad()
def sample(scales, n, steps=STEPS):
    """n images, uint8: every band out of noise, coarse first, each given what is there."""
    x = None
    for scale, side in zip(scales, (SIDE >> SCALES - 1, *(SIDE >> s for s in range(SCALES - 1, 0, -1))), strict=True):
        noise = torch.randn(n, len(scale.mean), side, side)
        y = scale.black(scale.solve(noise, x, torch.linspace(1, 0, steps + 1) ** 2, noise)[0])
        x = y if x is None else merge(x, y)
    return ((x + 1) * 128).clamp(0, 255).byte()


def train(pictures, steps):
    """Scales trained by Adam with warm-up and cosine decay: the moving average of their weights."""
    scales = nn.ModuleList(Scale(*part) for part in bands(crops(pictures, 2000)))
    average = torch.optim.swa_utils.AveragedModel(scales, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA))
    optimizer, start = torch.optim.Adam(scales.parameters()), time.monotonic()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        parts = zip(scales, bands(crops(pictures, BATCH)), strict=True)
        loss = sum(scale.loss(*part) * part[0][0].numel() for scale, part in parts) / (3 * SIDE**2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(scales.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(scales)
        if step % 10 == 0:
            print(f"\rstep {step}, {time.monotonic() - start:.0f} s, loss {loss:.3f}", end="", file=sys.stderr)
    return average.module


if __name__ == "__main__":
    torch.manual_seed(0)
    train_set, test_set = photographs()
    scales = train(train_set, steps=int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    for name, picture in zip(("chelsea", "flower"), test_set, strict=True):
        bits = bits_per_dim(scales, crops([picture], 64, augment=False))
        print(f"\n{name}: {bits.mean():.3f} ± {bits.std() / 8:.3f} bits/dim", end="")
    rows = sample(scales, 64).unflatten(0, (8, 8)).permute(0, 3, 1, 4, 2).reshape(8 * SIDE, 8 * SIDE, 3)
    Image.fromarray(rows.numpy()).resize((512, 512), Image.NEAREST).save("msflow.png")
    print("\n64 samples: msflow.png")
