"""The drawn road: what is said to be true of a frame is what the frame shows."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, masks_to_boxes

from predoc_lib.data import driving
from predoc_lib.data.driving import (
    CLASSES,
    FOCAL,
    HEIGHT,
    HORIZON,
    INTERVAL,
    MASK_CLASSES,
    VISIBLE,
    Scene,
    Thing,
)


def warped(image, flow):
    """image(p + flow(p))."""
    h, w = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    grid = torch.stack([(x + flow[0]) / w, (y + flow[1]) / h], -1) * 2 - 1
    return F.grid_sample(image[None], grid[None], align_corners=False)[0]


def difference(scene, t0, t1, sign=1):
    flow, seen = scene.flow(t0, t1)
    before, now = (scene.frame(t).float() / 255 for t in (t0, t1))
    return (warped(before, sign * flow) - now).abs().mean(0)[seen].mean()


def test_the_same_seed_gives_the_same_drive_and_splits_differ():
    a, b = (driving(2, "test", seed=3) for _ in range(2))
    assert all(torch.equal(x.frame(1.5), y.frame(1.5)) for x, y in zip(a, b, strict=True))
    frames = [
        driving(2, split, seed=seed)[i].frame(0) for split in ("train", "test") for seed in (0, 1) for i in (0, 1)
    ]
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(frames, 2))


def test_flow_says_where_points_were():
    for i in range(6):
        scene = Scene(i, noise=0)
        for t0, t1 in ((0, 1), (4, 2.5)):
            still = (scene.frame(t0).float() - scene.frame(t1).float()).abs().mean() / 255
            assert difference(scene, t0, t1) < 0.6 * still
            assert difference(scene, t0, t1) < 0.3 * difference(scene, t0, t1, sign=-1)


def test_flow_over_no_time_is_none_and_there_and_back_is_nothing():
    scene = driving(1)[0]
    assert scene.flow(2.0, 2.0)[0].abs().max() < 1e-3
    there, seen = scene.flow(0, 1)
    back, seen_back = scene.flow(1, 0)
    # back, looked up where `there` leads, undoes it; near the edges of things the lookup mixes two motions
    sum_ = (there + warped(back, there)).norm(dim=0)
    sure = seen & (warped(seen_back[None].float(), there)[0] > 0.99)
    assert sum_[sure].median() < 0.05
    assert (sum_[sure] < 0.5).float().mean() > 0.95


def still(*things, **options):
    """A scene of these things alone, seen by a camera that drives straight ahead at 10 m/s."""
    scene = Scene(0, noise=0, **options)
    scene.things, scene.speed, scene.sway, scene.turn = list(things), 10.0, 0.0, 0.0
    return scene


def board(x, z, vx=0.0, vz=0.0, kind="post", width=1.0, height=1.5):
    return Thing(kind, x, z, vx, vz, width, height, (0.9, 0.1, 0.1), 0.0)


@pytest.mark.parametrize("t", [0.0, 0.37, 2.5, 6.0])
def test_a_box_is_where_a_pinhole_camera_sees_it(t):
    """At any real time: u = w/2 + f x/z, v = horizon + f y/z, for the height y below the camera."""
    h, w = size = 90, 160
    objects = still(board(1.0, 20.0, vx=-0.8, vz=2.0, kind="truck", width=2.5, height=3.0), size=size).objects(t)
    seconds = t * INTERVAL
    x, z, f = 1.0 - 0.8 * seconds, 20.0 + (2.0 - 10.0) * seconds, FOCAL * w
    u = [w / 2 + f * (x + side) / z for side in (-1.25, 1.25)]
    v = [HORIZON * h + f * (HEIGHT - up) / z for up in (3.0, 0.0)]
    assert objects.boxes[0].tolist() == pytest.approx([u[0] / w, v[0] / h, u[1] / w, v[1] / h], abs=1e-6)
    assert CLASSES[objects.labels[0]] == "truck"


def test_flow_of_a_board_and_of_the_ground_is_what_the_pinhole_camera_says():
    scene, (t0, t1) = still(board(0.0, 12.0, vx=1.0, vz=6.0, width=2.0, height=2.0)), (0.5, 2.25)
    h, w = scene.size
    flow, seen = scene.flow(t0, t1)
    owner, f = torch.from_numpy(scene._look(t1).owner), FOCAL * w
    v, u = (a.double() + 0.5 for a in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    t0, t1 = t0 * INTERVAL, t1 * INTERVAL
    z0, z1 = (12 + (6 - 10) * t for t in (t0, t1))
    x, y = (u - w / 2) / f * z1, (v - HORIZON * h) / f * z1  # metres, of the board's point now
    then = torch.stack([w / 2 + f * (x - (t1 - t0)) / z0, HORIZON * h + f * y / z0]) - torch.stack([u, v])
    assert (flow - then)[:, owner == 0].abs().max() < 1e-4
    assert seen[owner == 0].float().mean() > 0.9  # an edge is a pixel wide
    z = f * HEIGHT / (v - HORIZON * h)
    z0, x = z + 10 * (t1 - t0), (u - w / 2) / f * z
    then = torch.stack([w / 2 + f * x / z0, HORIZON * h + f * HEIGHT / z0]) - torch.stack([u, v])
    ground = (owner == -1) | (owner == -2)
    assert (flow - then)[:, ground].abs().max() < 1e-3


def test_what_hides_a_thing_is_counted_and_flow_knows_it():
    """A near board covers half of a far one, then passes on: what appears was not seen before."""
    near, far = board(-1.0, 8.0, width=2.0, vz=10.0, vx=-8.0), board(0.0, 16.0, 0.0, 10.0, "car", 3.2, 1.5)
    scene = still(near, far, size=(192, 320))
    a, b = scene.objects(0), scene.objects(4)
    assert a.visible.tolist() == pytest.approx([0.5], abs=0.03)
    assert b.visible.tolist() == pytest.approx([1.0], abs=0.03)  # two drawings differ at the edges
    assert a.identities.tolist() == b.identities.tolist() == [1]
    _, seen = scene.flow(0, 4)
    mine = torch.from_numpy(scene._look(4.0).owner) == 1
    left = mine & (torch.arange(320) < 160)
    right = mine & (torch.arange(320) >= 160)
    assert not seen[left].any()
    assert seen[right].float().mean() > 0.95


def test_dusk_is_darker_than_day():
    for i in range(4):
        scene = Scene(i)
        light = []
        for scene.dusk in (False, True):
            scene._look.cache_clear()
            light.append(scene.frame(0).float().mean())
        assert light[1] < 0.75 * light[0]


def test_a_seen_objects_box_is_the_box_of_its_pixels():
    checked = 0
    for scene in driving(40, "test"):
        objects, owner = scene.objects(2), torch.from_numpy(scene._look(2.0).owner)
        h, w = scene.size
        for i in range(len(objects)):
            if objects.visible[i] < 1 or CLASSES[objects.labels[i]] == "person":  # legs and shoulders are narrower
                continue
            drawn = masks_to_boxes((owner == objects.identities[i])[None])[0] + torch.tensor([0.0, 0, 1, 1])
            assert (drawn - objects.boxes[i] * torch.tensor([w, h, w, h])).abs().max() < 2
            checked += 1
    assert checked > 30


def test_objects_hide_one_another_and_keep_their_identities():
    hidden, kept = 0, 0
    for scene in driving(20):
        now, later = scene.objects(1), scene.objects(1.5)
        assert len(now.identities.unique()) == len(now)
        assert (now.visible >= VISIBLE).all()
        hidden += (now.visible < 0.8).sum()
        same = [(i, j) for i, a in enumerate(now.identities) for j, b in enumerate(later.identities) if a == b]
        for i, j in same:
            assert now.labels[i] == later.labels[j]
            kept += box_iou(now.boxes[i : i + 1], later.boxes[j : j + 1]).item() > 0.3
    assert hidden > 5
    assert kept > 50


def test_every_class_and_both_lights_are_there():
    scenes = driving(40, "validation")
    labels = torch.cat([scene.objects(0).labels for scene in scenes])
    assert all((labels == i).sum() > 10 for i in range(len(CLASSES)))
    assert 5 < sum(scene.dusk for scene in scenes) < 35
    masks = torch.stack([scene.mask(0) for scene in scenes])
    assert masks.unique().tolist() == list(range(len(MASK_CLASSES)))


def test_time_is_continuous():
    scene = driving(1, "test")[0]
    frames = scene.video([3.0, 3.01, 3.5]).float()
    near, far = ((frames[i] - frames[0]).abs().mean() for i in (1, 2))
    assert near < 0.7 * far


def test_bad_requests_are_refused():
    for options in ({"n": 0}, {"n": 1, "split": "tset"}, {"n": 1, "size": (16, 64)}):
        with pytest.raises(ValueError, match="driving needs a split of train, validation, test"):
            driving(**options)
    assert Scene(0, (64, 96)).frame(0).shape == (3, 64, 96)
