"""Lower precision reaches the layers of every experiment that offers it, and only while it is trained."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from predoc_lib.experiments import features_to_frames, flow_warp, mimic, mimic_dusk, segmentation, yolo_dynamics
from predoc_lib.experiments.config import build
from predoc_lib.precision import compiled, layers_of, lower_precision

EXPERIMENTS = {
    "flow_warp": (flow_warp, {"steps": 2}),
    "features_to_frames": (features_to_frames, {"steps": 2}),
    "irevnet": (features_to_frames, {"steps": 2, "method": "irevnet"}),
    "segmentation": (segmentation, {"steps": 2}),
    "mimic": (mimic, {"steps": 2}),
    "mimic_dusk": (mimic_dusk, {"steps": 2}),
    "yolo_dynamics": (yolo_dynamics, {"steps": 2}),
}


@pytest.mark.filterwarnings("ignore:The model was trained", "ignore:This processor has no instructions")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_in_bfloat16_trains_other_weights_to_nearly_the_same_loss(name, tmp_path):
    module, few = EXPERIMENTS[name]
    losses, weights = {}, {}
    for precision in ("float32", "bfloat16"):
        config = build(module.Config, "smoke", device="cpu", precision=precision, **few)
        record = module.run(config, tmp_path / precision, progress=False)
        losses[precision] = record["history"][0]["loss"]
        weights[precision] = load_file(tmp_path / precision / "weights.safetensors")
    # not the loss: where a network starts at the identity, bfloat16 changes it by less than float32 can show
    assert any(not torch.equal(weights["float32"][key], weights["bfloat16"][key]) for key in weights["float32"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1, abs=0.05)


def test_layers_are_convolutions_and_products_and_are_as_they_were_afterwards():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    layers, x = layers_of(model), torch.rand(4, 1, 1, 1)
    assert layers == [model[0], model[3]]
    before = model(x)
    with lower_precision(layers, "bfloat16", "cpu"):
        lowered = model(x)
        assert lowered.dtype is torch.float32
    assert not torch.equal(lowered, before)
    assert torch.equal(model(x), before)


@pytest.mark.slow
def test_a_network_in_bfloat16_inside_a_compiled_module_is_both_and_both_are_undone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(3, 2), []

        def forward(self, x):
            self.seen.append((torch.compiler.is_compiling(), self.net(x).dtype))
            return 2 * self.net(x)

    outer, x = Outer(), torch.rand(4, 3)
    before = outer(x)
    with compiled([outer], "reduce-overhead"), lower_precision([outer.net], "bfloat16", "cpu"):
        lowered = outer(x)
    assert outer.seen == [(False, torch.float32), (True, torch.float32)]
    assert not torch.equal(lowered, before)
    torch.testing.assert_close(lowered, before, atol=0.05, rtol=0)
    assert torch.equal(outer(x), before)
    assert "forward" not in vars(outer) | vars(outer.net)

    with compiled([outer.net]):
        inner = outer.net.forward
        with lower_precision([outer.net], "bfloat16", "cpu"):
            torch.testing.assert_close(outer(x), lowered)
        assert outer.net.forward is inner
    assert torch.equal(outer(x), before)
