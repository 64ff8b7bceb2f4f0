"""``.flo`` files there and back, and pairs whose flow takes one picture to the other."""

import os
import struct

import numpy as np
import pytest
import torch

from predoc_lib.data import DataError, flow_pairs
from predoc_lib.data.flow_pairs import halved, read_flo, stereo_pair, write_flo
from predoc_lib.files import FileError
from predoc_lib.flow_warp import inside, warp


def test_a_flow_comes_back_from_its_file_and_the_unknown_stays_unknown(tmp_path):
    flow = torch.randn(2, 4, 7)
    known = torch.rand(4, 7) < 0.7
    flow[0, 1, 2], known[1, 2] = torch.nan, True
    write_flo(tmp_path / "a.flo", flow, known)
    found, found_known = read_flo(tmp_path / "a.flo")
    known[1, 2] = False
    assert torch.equal(found_known, known)
    assert torch.equal(found, torch.where(known, flow, 0.0))


def test_a_file_is_middleburys_byte_by_byte(tmp_path):
    write_flo(tmp_path / "a.flo", torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    assert (tmp_path / "a.flo").read_bytes() == b"PIEH" + struct.pack("<ii4f", 2, 1, 1, 3, 2, 4)


HEADER = struct.pack("<f", 202021.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<fii2f", 1.0, 1, 1, 0, 0), "does not begin with 202021.25"),
        (b"PI", "does not begin with"),
        (HEADER + struct.pack("<ii", -3, 4), "-3 x 4 pixels"),
        (HEADER + struct.pack("<ii", 10**6, 1), "1000000 x 1 pixels"),
        (HEADER + struct.pack("<ii3f", 1, 2, 0, 0, 0), "24 bytes, but 1 x 2 pixels take 28"),
        (HEADER + struct.pack("<ii3f", 1, 1, 0, 0, 0), "24 bytes, but 1 x 1 pixels take 20"),
    ],
)
def test_a_damaged_file_is_refused_with_a_sentence(tmp_path, content, message):
    (tmp_path / "bad.flo").write_bytes(content)
    with pytest.raises(FileError, match=message):
        read_flo(tmp_path / "bad.flo")


def test_an_absent_file_and_an_unknown_pair_are_named(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        read_flo(tmp_path / "nowhere.flo")
    with pytest.raises(DataError, match="motorcycle"):
        flow_pairs("motorcicle")


def test_a_disparity_is_a_flow_and_the_nearer_board_hides_what_is_behind():
    """A board at disparity 3 before a wall at 1: two columns of the wall are hidden from the right camera."""
    disparity = torch.ones(2, 12)
    disparity[:, 5:8] = 3
    disparity[1, 0] = torch.inf
    pair = stereo_pair(*torch.zeros(2, 3, 2, 12, dtype=torch.uint8), disparity)
    assert torch.equal(pair.flow[0, 0], -disparity[0])
    assert not pair.flow[1].any()
    assert torch.equal(pair.known, disparity.isfinite())
    assert pair.flow[0, 1, 0] == 0
    hidden = [0, 3, 4]  # 0 leaves the picture
    assert pair.visible[0].tolist() == [i not in hidden for i in range(12)]


def test_the_true_flow_of_the_embedded_pair_takes_one_picture_to_the_other():
    pair = flow_pairs("motorcycle")
    image0, image1 = pair.batch()
    seen = pair.visible[None, None] & inside(pair.flow[None])

    def difference(flow):
        return (warp(image1, flow) - image0).abs()[seen.expand_as(image0)].mean()

    flow = pair.flow[None]
    assert difference(flow) < 0.3 * difference(torch.zeros_like(flow))
    assert difference(-flow) > difference(torch.zeros_like(flow)) * 0.8
    assert 0.8 < pair.visible.float().mean() < pair.known.float().mean() < 1


def test_half_the_size_has_half_the_flow():
    pair = flow_pairs("motorcycle")
    small = halved(pair)
    assert small.image0.shape == (3, 250, 370)
    both = small.known & pair.known[::2, ::2][:, :370]
    ratio = small.flow[0][both] / pair.flow[0, ::2, ::2][:, :370][both]
    assert abs(ratio.median() - 0.5) < 0.01
    assert not small.flow[:, ~small.known].any()


@pytest.mark.data
@pytest.mark.skipif("PREDOC_DATA" not in os.environ, reason="needs PREDOC_DATA")
def test_middleburys_truth_takes_frame_11_to_frame_10():
    try:
        pair = flow_pairs("RubberWhale")
    except DataError as error:
        pytest.skip(str(error))
    image0, image1 = pair.batch()
    known = pair.known.expand(3, -1, -1)[None].numpy()
    moved = np.abs((warp(image1, pair.flow[None]) - image0).numpy())[known].mean()
    assert moved < 0.4 * np.abs((image1 - image0).numpy())[known].mean()
    assert abs(pair.known.float().mean() - 0.984) < 0.001
