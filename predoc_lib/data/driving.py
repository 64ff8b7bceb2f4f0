"""A road seen from a car, drawn at any real time, with everything that is true of it: boxes, masks, optical flow.

The world is flat: a ground plane with lanes, and things that stand on it as upright boards facing the camera. The
camera drives along, sways between its lane's edges and turns a little. All motion is a formula, so that frames, boxes
and flow exist between the frames too. Metres and seconds in the world; times are in frames, pixels are unit squares.
"""

import dataclasses
import functools

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

CLASSES = ("car", "truck", "person")
MASK_CLASSES = ("background", "road", *CLASSES)
INTERVAL = 0.1  # seconds from frame to frame
HEIGHT = 1.4  # of the camera
FOCAL, HORIZON = 0.8, 0.42  # in widths and heights of the image
NEAR, FAR = 2.5, 42.0  # a thing is drawn between them
SMALLEST, VISIBLE = 4, 0.35  # a true box has 4 pixels a side at least, and that share of it is seen
SUPER = 2  # a pixel is the mean of 2 x 2 samples


@dataclasses.dataclass(frozen=True)
class Thing:
    """One board: where it is at t = 0 and how it moves along the road (z) and across (x)."""

    kind: str
    x: float
    z: float
    vx: float
    vz: float  # relative to the ground
    width: float
    height: float
    colour: tuple[float, float, float]
    phase: float
    oncoming: bool = False


@dataclasses.dataclass(frozen=True)
class Objects:
    """The true objects of one frame, the nearest first.

    Attributes:
        boxes: left, top, right, bottom, in fractions of the image, cut off at its edges.
        labels: numbers of ``CLASSES``.
        identities: the same number is the same object, at any time.
        visible: the share of the box's board that nothing hides.
    """

    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]
    identities: Int[Tensor, " n"]
    visible: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)


class Scene:
    """One drive: ask it for any time, in frames."""

    def __init__(self, seed: int | tuple[int, ...], size: tuple[int, int] = (96, 160), noise: float = 0.012) -> None:
        rng = np.random.default_rng(seed)
        self.noise = noise  # of the camera: its standard deviation, of levels from 0 to 1
        self.size, self.seed = size, int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.dusk = rng.random() < 0.4
        self.speed = rng.uniform(6, 14)
        self.sway, self.turn = rng.uniform(0, 0.5), rng.uniform(0, 0.05)
        self.rates, self.phases = rng.uniform(0.6, 1.8, 2), rng.uniform(0, 2 * np.pi, 2)
        self.hue = rng.uniform(-0.06, 0.06, 3)
        self.hills = rng.normal(size=8)
        self.things = _traffic(rng, self.speed)

    def camera(self, t: float) -> tuple[float, float, float]:
        """Its position across and along the road, and the angle that it looks to the right."""
        s = t * INTERVAL
        x = self.sway * np.sin(self.rates[0] * s + self.phases[0])
        return x, self.speed * s, self.turn * np.sin(self.rates[1] * s + self.phases[1])

    def frame(self, t: float) -> UInt8[Tensor, "3 H W"]:
        """The picture."""
        return _to_tensor(self._look(float(t)).colours)

    def video(self, t: list[float] | Tensor) -> UInt8[Tensor, "T 3 H W"]:
        """The pictures at several times."""
        return torch.stack([self.frame(float(time)) for time in t])

    def objects(self, t: float) -> Objects:
        """What is on it."""
        h, w = self.size
        shown, found = self._look(float(t)).owner, []
        for i, thing in enumerate(self.things):
            if thing.kind not in CLASSES or (place := self._place(thing, float(t))) is None:
                continue
            left, top, right, bottom, z = place
            whole = (right - left) * (bottom - top)
            left, right = np.clip([left, right], 0, w)
            top, bottom = np.clip([top, bottom], 0, h)
            if min(right - left, bottom - top) < SMALLEST:
                continue
            # A board is no full rectangle: its own drawing, alone, is what could be seen of it.
            drawn = self._drawn(i, float(t))
            visible = (shown == i).sum() / max(1, drawn)
            inside = (right - left) * (bottom - top) / whole
            if visible >= VISIBLE and inside >= VISIBLE:
                found.append((z, [left / w, top / h, right / w, bottom / h], CLASSES.index(thing.kind), i, visible))
        found.sort(key=lambda row: row[0])
        _, boxes, labels, identities, visible = zip(*found, strict=True) if found else ([],) * 5
        return Objects(
            torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(identities, dtype=torch.int64),
            torch.tensor(visible, dtype=torch.float32),
        )

    def mask(self, t: float) -> UInt8[Tensor, "H W"]:
        """The class of every pixel, a number of ``MASK_CLASSES``."""
        look = self._look(float(t))
        classes = [MASK_CLASSES.index(thing.kind) if thing.kind in CLASSES else 0 for thing in self.things]
        table = np.array([*classes, 0, 1, 0], np.uint8)  # then sky, road, grass: -3, -2, -1
        return torch.from_numpy(table[look.owner])

    def flow(self, t0: float, t1: float) -> tuple[Float[Tensor, "2 H W"], Bool[Tensor, "H W"]]:
        """Where the points seen at t1 were at t0: (dx, dy) in pixels on t1's grid, and which of them were seen then."""
        h, w = self.size
        v, u = np.meshgrid(np.arange(h) + 0.5, np.arange(w) + 0.5, indexing="ij")
        owner = self._look(float(t1)).owner
        at_u, at_v = self._project(*self._ground(u, v, float(t1)), float(t0))
        sky = owner == -3
        turned = self.camera(t0)[2] - self.camera(t1)[2]
        far = np.tan(np.arctan((u - w / 2) / (FOCAL * w)) - turned) * FOCAL * w + w / 2
        at_u, at_v = np.where(sky, far, at_u), np.where(sky, v, at_v)
        for i in np.unique(owner[owner >= 0]):
            now, before = self._place(self.things[i], float(t1)), self._place(self.things[i], float(t0))
            mine = owner == i
            if before is None:
                at_u[mine] = np.nan
                continue
            a, b = (u[mine] - now[0]) / (now[2] - now[0]), (v[mine] - now[1]) / (now[3] - now[1])
            at_u[mine] = before[0] + a * (before[2] - before[0])
            at_v[mine] = before[1] + b * (before[3] - before[1])
        inside = (at_u >= 0) & (at_u < w) & (at_v >= 0) & (at_v < h)
        earlier = self._look(float(t0)).owner
        column, row = (np.where(inside, at, 0).astype(int) for at in (at_u, at_v))
        there = earlier[row, column]
        # Ground is ground, road or grass; the edge between them is no occlusion.
        seen = inside & (np.where(there > -3, np.maximum(there, -1), there) == np.where(sky, -3, np.maximum(owner, -1)))
        moved = np.nan_to_num(np.stack([at_u - u, at_v - v])).astype(np.float32)
        return torch.from_numpy(moved), torch.from_numpy(seen)

    def _ground(self, u: np.ndarray, v: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """The ground's point, across and along the road, behind each pixel below the horizon (else far away)."""
        h, w = self.size
        x, z, angle = self.camera(t)
        depth = FOCAL * w * HEIGHT / np.maximum(v - HORIZON * h, 1e-3)
        side = (u - w / 2) / (FOCAL * w) * depth
        return x + side * np.cos(angle) + depth * np.sin(angle), z + depth * np.cos(angle) - side * np.sin(angle)

    def _project(self, x: np.ndarray, z: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """The pixel of a point of the ground."""
        h, w = self.size
        cx, cz, angle = self.camera(t)
        side = (x - cx) * np.cos(angle) - (z - cz) * np.sin(angle)
        depth = np.maximum((x - cx) * np.sin(angle) + (z - cz) * np.cos(angle), 1e-3)
        return w / 2 + FOCAL * w * side / depth, HORIZON * h + FOCAL * w * HEIGHT / depth

    def _place(self, thing: Thing, t: float) -> tuple[float, float, float, float, float] | None:
        """Left, top, right and bottom of its board in pixels, and its depth; None if it is too near or too far."""
        h, w = self.size
        s = t * INTERVAL
        cx, cz, angle = self.camera(t)
        dx, dz = thing.x + thing.vx * s - cx, thing.z + thing.vz * s - cz
        side, depth = dx * np.cos(angle) - dz * np.sin(angle), dx * np.sin(angle) + dz * np.cos(angle)
        if not NEAR < depth < FAR:
            return None
        scale = FOCAL * w / depth
        bottom, middle = HORIZON * h + scale * HEIGHT, w / 2 + scale * side
        half = scale * thing.width / 2
        return middle - half, bottom - scale * thing.height, middle + half, bottom, depth

    def _drawn(self, i: int, t: float) -> int:
        """How many pixels of the image the thing alone would have."""
        owner = np.full(self.size, -1)
        self._board(i, t, None, owner)
        return int((owner == i).sum())

    def _board(self, i: int, t: float, colours: np.ndarray | None, owner: np.ndarray) -> None:
        """Draw a thing over what is there."""
        thing = self.things[i]
        place = self._place(thing, t)
        if place is None:
            return
        left, top, right, bottom, _ = place
        k = owner.shape[0] / self.size[0]
        rows = np.arange(max(0, int(top * k)), min(owner.shape[0], int(bottom * k) + 1))
        columns = np.arange(max(0, int(left * k)), min(owner.shape[1], int(right * k) + 1))
        if not (len(rows) and len(columns)):
            return
        a = ((columns + 0.5) / k - left) / (right - left)  # 0 to 1 from left to right
        b = (bottom - (rows + 0.5) / k) / (bottom - top)  # 0 to 1 from the ground up
        paint, solid = _PAINT[thing.kind](a[None], b[:, None], thing, t, self.dusk)
        window = np.ix_(rows, columns)
        solid = solid & (a >= 0) & (a <= 1) & (b >= 0)[:, None] & (b <= 1)[:, None]
        owner[window] = np.where(solid, i, owner[window])
        if colours is not None:
            colours[window] = np.where(solid[..., None], paint, colours[window])

    @functools.lru_cache(maxsize=64)  # noqa: B019  a scene is small, and its frames are asked for more than once
    def _look(self, t: float) -> "_Look":
        """The picture at t, and whose each pixel is."""
        h, w = self.size
        v, u = np.meshgrid((np.arange(h * SUPER) + 0.5) / SUPER, (np.arange(w * SUPER) + 0.5) / SUPER, indexing="ij")
        top = int((v[:, 0] <= HORIZON * h).sum())  # rows of sky
        x, z = self._ground(u[top:], v[top:], t)
        road = np.abs(x) < 5.6
        colours = np.concatenate([self._sky(u[:top], v[:top], t), self._earth(x, z, road)])
        owner = np.full(v.shape, -3)
        owner[top:] = np.where(road, -2, -1)
        order = sorted(range(len(self.things)), key=lambda i: -(self._place(self.things[i], t) or [0] * 5)[4])
        for i in order:
            self._board(i, t, colours, owner)
        if self.dusk:
            colours = colours * np.array([0.55, 0.5, 0.62])
        colours = colours.reshape(h, SUPER, w, SUPER, 3).mean((1, 3))
        noise = np.random.default_rng((self.seed, round(t * 1000) % 2**31)).normal(scale=self.noise, size=colours.shape)
        # A pixel belongs to what is at its middle, right below which a sample lies.
        return _Look((colours + noise).clip(0, 1), owner[SUPER // 2 :: SUPER, SUPER // 2 :: SUPER])

    def _earth(self, x: np.ndarray, z: np.ndarray, road: np.ndarray) -> np.ndarray:
        grain = _noise(x, z, 0.8, self.seed)
        paved, grass = np.array([0.40, 0.40, 0.42]), np.array([0.30, 0.42, 0.22])
        colours = np.where(road[..., None], paved, grass + self.hue / 2) * (0.85 + 0.3 * grain)[..., None]
        walk = (np.abs(x) > 5.6) & (np.abs(x) < 7.8)
        colours = np.where(walk[..., None], np.array([0.58, 0.55, 0.52]) * (0.9 + 0.2 * grain)[..., None], colours)
        dashes = (np.abs(np.abs(x) - 1.75) < 0.08) & (np.mod(z, 6) < 2.5)
        lines = dashes | (np.abs(np.abs(x) - 5.25) < 0.08)
        colours = np.where(lines[..., None], 0.9, colours)
        mist = np.clip(z - z.min(), 0, 80)[..., None] / 160
        return colours * (1 - mist) + 0.62 * mist

    def _sky(self, u: np.ndarray, v: np.ndarray, t: float) -> np.ndarray:
        h, w = self.size
        up = (1 - v / (HORIZON * h)).clip(0, 1)[..., None]
        low, high = ([0.95, 0.62, 0.45], [0.45, 0.4, 0.62]) if self.dusk else ([0.8, 0.87, 0.93], [0.4, 0.6, 0.85])
        colours = np.array(low) * (1 - up) + np.array(high) * up
        angle = np.arctan((u[0] - w / 2) / (FOCAL * w)) + self.camera(t)[2]
        waves = sum(a * np.sin((3 + 4 * k) * angle + a * 9) / (k + 2) for k, a in enumerate(self.hills))
        hill = HORIZON * h - v < h * (0.05 + 0.025 * waves)
        return np.where(hill[..., None], np.array([0.36, 0.43, 0.42]) + self.hue / 2, colours)


@dataclasses.dataclass(frozen=True)
class _Look:
    colours: np.ndarray  # [H, W, 3], 0 to 1
    owner: np.ndarray  # [H, W]: the number of a thing; -3 sky, -2 road, -1 other ground


def driving(n: int, split: str = "train", size: tuple[int, int] = (96, 160), seed: int = 0) -> list[Scene]:
    """n drives, each with its own road, light and traffic; those of the splits share no random number.

    Args:
        n: at least 1.
        split: "train", "validation" or "test".
        size: height and width of the pictures, pixels.
        seed: the same gives the same drives.

    Raises:
        ValueError: unknown split, n below 1, a side below 32.
    """
    splits = ("train", "validation", "test")
    if split not in splits or n < 1 or min(size) < 32:
        raise ValueError(
            f"driving needs a split of {', '.join(splits)}, n of at least 1 and sides of at least 32 pixels, got "
            f"split={split!r}, n={n}, size={tuple(size)}."
        )
    return [Scene((splits.index(split), seed, i), size) for i in range(n)]


def _traffic(rng: np.random.Generator, speed: float) -> list[Thing]:
    """Cars and trucks in three lanes, people on the walks and across the road, trees and posts beside it."""

    def vehicle(lane: float, z: float, vz: float, oncoming: bool) -> Thing:
        truck = rng.random() < 0.3
        width, height = (2.5, rng.uniform(2.8, 3.4)) if truck else (rng.uniform(1.7, 1.95), rng.uniform(1.4, 1.65))
        drift = rng.uniform(-0.5, 0.5) if rng.random() < 0.5 else 0.0
        colour = tuple(rng.uniform(0.15, 0.95, 3))
        return Thing(
            "truck" if truck else "car", lane + rng.uniform(-0.3, 0.3), z, drift, vz, width, height, colour,
            rng.uniform(0, 1), oncoming,
        )  # fmt: skip

    things = []
    for lane, spacing in ((0.0, (9, 14)), (3.5, (6, 12)), (-3.5, (10, 18))):
        z = rng.uniform(*spacing)
        while z < 60:
            if rng.random() < 0.8:
                oncoming = lane < 0
                relative = rng.uniform(-5, 5) if lane else rng.uniform(-3.5, 5) * min(1, z / 12)
                things.append(vehicle(lane, z, -rng.uniform(4, 9) if oncoming else speed + relative, oncoming))
            z += rng.uniform(*spacing) * 1.5
    for _ in range(rng.integers(2, 6)):
        crosses = rng.random() < 0.5
        side = rng.choice([-1, 1])
        x = side * rng.uniform(5.8, 7.4)
        vx = -side * rng.uniform(0.8, 2.2) if crosses else 0.0
        vz = rng.uniform(-0.4, 0.4) if crosses else rng.choice([-1, 1]) * rng.uniform(0.8, 1.8)
        height = rng.uniform(1.55, 1.9)
        things.append(
            Thing("person", x, rng.uniform(6, 40), vx, vz, 0.42 * height, height, tuple(rng.uniform(0.1, 0.95, 3)),
                  rng.uniform(0, 6))
        )  # fmt: skip
    for side in (-1, 1):
        z = rng.uniform(4, 10)
        while z < 75:
            kind, width, height = ("tree", 3.2, rng.uniform(4, 6.5)) if rng.random() < 0.6 else ("post", 0.25, 5.0)
            x = side * rng.uniform(8.6, 13)
            things.append(Thing(kind, x, z, 0.0, 0.0, width, height, (0.2, 0.35, 0.15), rng.uniform(0, 1)))
            z += rng.uniform(5, 14)
    return things


def _paint(*layers: tuple[np.ndarray, object]) -> tuple[np.ndarray, np.ndarray]:
    """Colours and mask of layers (mask, colour), the later above the earlier."""
    shape = np.broadcast_shapes(*(mask.shape for mask, _ in layers))
    colours, solid = np.zeros((*shape, 3)), np.zeros(shape, bool)
    for mask, colour in layers:
        colours = np.where(np.broadcast_to(mask, shape)[..., None], np.array(colour), colours)
        solid |= mask
    return colours, solid


def _car(a, b, thing: Thing, t: float, dusk: bool):
    body = np.array(thing.colour)
    middle = np.abs(a - 0.5)
    lamp = ([1.0, 1.0, 0.85] if thing.oncoming else [0.9, 0.1, 0.1]) if dusk or not thing.oncoming else [0.9] * 3
    return _paint(
        ((b < 0.25) & (middle > 0.28) & (middle < 0.46), [0.06] * 3),
        ((b > 0.12) & (b < 0.62) & (middle < 0.5), body),
        ((b >= 0.62) & (middle < 0.46 - 0.3 * (b - 0.62)), body * 0.8),
        ((b > 0.64) & (b < 0.92) & (middle < 0.4 - 0.3 * (b - 0.62)), [0.12, 0.16, 0.2]),
        ((b > 0.4) & (b < 0.56) & (middle > 0.33) & (middle < 0.47), np.array(lamp) / (0.6 if dusk else 1)),
        ((b > 0.2) & (b < 0.3) & (middle < 0.45), body * 0.5),
    )


def _truck(a, b, thing: Thing, t: float, dusk: bool):
    body = 0.5 + np.array(thing.colour) / 2
    middle = np.abs(a - 0.5)
    lamp = [1.0, 1.0, 0.85] if thing.oncoming else [0.9, 0.1, 0.1]
    front = (b > 0.45) & (b < 0.75) & (middle < 0.42) & thing.oncoming
    return _paint(
        ((b < 0.16) & (middle > 0.25) & (middle < 0.47), [0.05] * 3),
        ((b > 0.08) & (b < 0.2) & (middle < 0.5), [0.15] * 3),
        ((b >= 0.2) & (middle < 0.5), body),
        ((b >= 0.2) & (middle < 0.02) & (not thing.oncoming), body * 0.6),
        (front, [0.12, 0.16, 0.2]),
        ((b > 0.12) & (b < 0.2) & (middle > 0.36) & (middle < 0.48), np.array(lamp) / (0.6 if dusk else 1)),
    )


def _person(a, b, thing: Thing, t: float, dusk: bool):
    step = 0.16 * np.sin(2 * np.pi * 1.6 * t * INTERVAL + thing.phase) * (1 - b / 0.48)
    legs = (b < 0.48) & ((np.abs(a - 0.5 - step) < 0.1) | (np.abs(a - 0.5 + step) < 0.1))
    shirt = np.array(thing.colour)
    return _paint(
        (legs, shirt[::-1] * 0.4),
        ((b >= 0.44) & (b < 0.85) & (np.abs(a - 0.5) < 0.3), shirt),
        (((b - 0.92) / 0.08) ** 2 + ((a - 0.5) / 0.19) ** 2 < 1, [0.8, 0.6, 0.5]),
    )


def _tree(a, b, thing: Thing, t: float, dusk: bool):
    crown = ((b - 0.68) / 0.32) ** 2 + ((a - 0.5) / 0.5) ** 2 < 1
    green = np.array(thing.colour) * (0.8 + 0.4 * thing.phase)
    return _paint(((b < 0.5) & (np.abs(a - 0.5) < 0.05), [0.3, 0.22, 0.15]), (crown, green))


def _post(a, b, thing: Thing, t: float, dusk: bool):
    return _paint((np.broadcast_to(np.abs(a - 0.5) < 0.5, np.broadcast_shapes(a.shape, b.shape)), [0.45] * 3))


_PAINT = {"car": _car, "truck": _truck, "person": _person, "tree": _tree, "post": _post}


def _noise(x: np.ndarray, z: np.ndarray, side: float, seed: int) -> np.ndarray:
    """0 to 1, the same at the same place of the ground: a table of random numbers, between them a bilinear ramp."""
    table = _table(seed % 64)
    x, z = x / side, z / side
    i, j = np.floor(x).astype(np.int64), np.floor(z).astype(np.int64)
    a, b = x - i, z - j
    corner = [table[(i + p) % 256, (j + q) % 256] for p, q in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return (corner[0] * (1 - a) + corner[1] * a) * (1 - b) + (corner[2] * (1 - a) + corner[3] * a) * b


@functools.lru_cache
def _table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((256, 256))


def _to_tensor(colours: np.ndarray) -> Tensor:
    return torch.from_numpy((255 * colours + 0.5).astype(np.uint8)).movedim(-1, 0).contiguous()
