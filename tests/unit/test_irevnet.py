"""The i-RevNet, which loses nothing, against its own inverse and the paper's sizes."""

import pytest
import torch
from torch import nn

from predoc_lib.irevnet import IResNet, IRevNet, ResidualBlock, gather, levels_for, scatter


def shaken(**options):
    """A network whose every parameter and statistic is random."""
    torch.manual_seed(0)
    model = IRevNet(**options)
    for p in model.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    model.train()(torch.randn(4, options.get("channels", 3), 2 * model.scale, model.scale))
    return model.eval()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("blocks", [(1,), (2, 3), (2, 1, 2, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_the_inverse_gives_the_image_back(blocks, channels, norm, dtype, most):
    model = shaken(blocks=blocks, channels=channels, norm=norm, features=channels).to(dtype)
    image = torch.rand(2, channels, 2 * model.scale, 3 * model.scale, dtype=dtype)
    feature, remainder = model(image)
    assert feature.shape == (2, channels, 2, 3)
    assert (model.inverse(feature, remainder) - image).abs().max() < most
    for block in model.blocks:
        nn.init.zeros_(block.net[-1].weight)
        if block.net[-1].bias is not None:
            nn.init.zeros_(block.net[-1].bias)
    assert (torch.cat([feature, remainder], 1) - torch.cat(model(image), 1)).abs().max() > 0.01, "F does something"


def test_the_forward_pass_gives_feature_and_remainder_back():
    model = shaken(blocks=(2, 2), features=10, norm=False).double()
    feature, remainder = torch.randn(2, 10, 3, 2).double(), torch.randn(2, 182, 3, 2).double()
    again = model(model.inverse(feature, remainder))
    for found, wanted in zip(again, (feature, remainder), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_padding_makes_room_and_the_image_still_comes_back():
    model = shaken(blocks=(2, 2), pad=6, norm=False).double()
    image = torch.rand(1, 3, 16, 8).double()
    feature, remainder = model(image)
    assert feature.shape == (1, (12 + 6) * 16, 2, 1)
    assert remainder.shape == (1, 0, 2, 1)
    assert (model.inverse(feature, remainder) - image).abs().max() < 1e-10


def test_in_float64_gradients_go_through_the_inverse():
    model = shaken(blocks=(1,), channels=1, features=4, norm=False).double()
    feature, remainder = (torch.randn(1, n, 1, 2).double().requires_grad_() for n in (4, 12))
    assert torch.autograd.gradcheck(model.inverse, (feature, remainder))


def test_the_papers_network_for_imagenet_has_its_sizes():
    """The bijective one, 6 + 16 + 72 + 6 blocks, with 29 million parameters, its classifier's among them."""
    with torch.device("meta"):
        model = IRevNet(blocks=(6, 16, 72, 6), outer=1)
        feature, remainder = model(torch.empty(1, 3, 224, 224))
    assert feature.shape == (1, 3072, 7, 7)
    assert remainder.numel() == 0
    assert feature.numel() == 3 * 224 * 224
    assert len(model.blocks) == 100
    parameters = sum(p.numel() for p in model.parameters()) + 2 * 3072 + 3072 * 1000 + 1000
    assert parameters == pytest.approx(29e6, abs=1e6)


def test_features_of_all_heads_become_one_and_heads_again():
    shapes = [(5, 2, 3), (2, 4, 6)]
    features = [torch.randn(2, *shape) for shape in shapes]
    one = gather(features)
    assert one.shape == (2, 5 + 2 * 4, 2, 3)
    for x, y in zip(scatter(one, shapes), features, strict=True):
        assert torch.equal(x, y)


def test_the_depth_that_reaches_a_grid_is_found_and_others_are_refused():
    assert levels_for((3, 96, 160), [(96, 6, 10), (64, 12, 20)]) == 3
    assert levels_for((3, 320, 320), [(96, 10, 10), (120, 20, 20)]) == 4
    with pytest.raises(ValueError, match="No depth takes an image of 96 x 160 to features of 7 x 10; it can reach 2"):
        levels_for((3, 96, 160), [(96, 7, 10)])
    with pytest.raises(ValueError, match="Heads of 9 x 15 and 6 x 10 cells cannot be joined"):
        levels_for((3, 96, 160), [(9, 6, 10), (4, 9, 15)])
    with pytest.raises(ValueError, match="cannot be larger"):
        levels_for((3, 96, 160), [(1024, 6, 10)])


@pytest.mark.parametrize("size", [(1, 3, 20, 16), (1, 3, 16, 12), (1, 1, 16, 16)], ids=str)
def test_images_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match="must have 3 channels and sides that divide by 8"):
        IRevNet(blocks=(1, 1))(torch.rand(size))


def test_an_invertible_residual_network_refuses_the_same():
    model = IResNet(3, (1, 1), 10, (4, 4))
    with pytest.raises(ValueError, match="must have 3 channels and sides that divide by 8"):
        model(torch.rand(1, 3, 20, 16))
    with pytest.raises(ValueError, match="must have 10 and 182 channels on the same grid"):
        model.inverse(torch.rand(1, 9, 2, 2))
    with pytest.raises(ValueError, match="a feature of 1 to 48 channels"):
        IResNet(3, (1,), 49, (4,))


@pytest.mark.parametrize(
    "options",
    [{"blocks": ()}, {"blocks": (1, 0)}, {"pad": -2}, {"pad": 1}, {"hidden": (4,), "blocks": (1, 1)}],
    ids=str,
)
def test_networks_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="An i-RevNet needs"):
        IRevNet(**options)


def test_a_feature_larger_than_the_image_and_one_of_another_size_are_refused():
    with pytest.raises(ValueError, match="1 to 48 channels, got 49"):
        IRevNet(blocks=(1,), features=49)
    model = IRevNet(blocks=(1,), features=40)
    with pytest.raises(ValueError, match="must have 40 and 8 channels on the same grid"):
        model.inverse(torch.rand(1, 40, 2, 2), torch.rand(1, 9, 2, 2))
    with pytest.raises(ValueError, match="must have 40 and 8 channels on the same grid"):
        model.inverse(torch.rand(1, 40, 2, 2), torch.rand(1, 8, 2, 3))
    assert torch.equal(model.inverse(x := torch.rand(1, 40, 2, 2)), model.inverse(x, torch.zeros(1, 8, 2, 2)))


def test_a_residual_block_shrinks_distances_by_its_contraction_even_with_large_weights():
    torch.manual_seed(0)
    block = ResidualBlock(4, 6, contraction=0.9).double()
    for p in block.parameters():
        p.data.mul_(50)
    for _ in range(50):
        block(torch.randn(1, 4, 6, 6).double())  # each pass improves the norm's estimate
    block.eval()
    x = torch.randn(1, 4, 6, 6).double()
    jacobian = torch.func.jacfwd(lambda x: block.g(x).flatten())(x).reshape(144, 144)
    assert torch.linalg.matrix_norm(jacobian, 2) < 0.9
    assert (block.inverse(block(x), 200) - x).abs().max() < 1e-8


def test_the_contractive_network_gives_the_image_back():
    torch.manual_seed(0)
    model = IResNet(3, (2, 2), 40, (8, 8), steps=200).double().eval()
    image = torch.rand(2, 3, 16, 24).double()
    feature, remainder = model(image)
    assert feature.shape == (2, 40, 2, 3)
    assert (model.inverse(feature, remainder) - image).abs().max() < 1e-10
    assert torch.equal(model.inverse(feature), model.inverse(feature, 0 * remainder))
