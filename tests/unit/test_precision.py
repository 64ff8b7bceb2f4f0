"""Lower precision reaches the layers of every experiment that offers it, and only while it is trained."""

import pytest
import torch
from torch import nn

from predoc_lib.experiments import features_to_frames, flow_warp, mimic, mimic_dusk, segmentation
from predoc_lib.experiments.config import build
from predoc_lib.precision import layers_of, lower_precision

EXPERIMENTS = {
    "flow_warp": (flow_warp, {"steps": 2}),
    "features_to_frames": (features_to_frames, {"steps": 2}),
    "irevnet": (features_to_frames, {"steps": 2, "method": "irevnet"}),
    "segmentation": (segmentation, {"steps": 2}),
    "mimic": (mimic, {"steps": 2}),
    "mimic_dusk": (mimic_dusk, {"steps": 2}),
}


@pytest.mark.filterwarnings("ignore:The model was trained")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_in_bfloat16_is_another_and_nearly_the_same(name):
    module, few = EXPERIMENTS[name]
    losses = [
        module.run(build(module.Config, "smoke", device="cpu", precision=p, **few), progress=False)["history"][0][
            "loss"
        ]
        for p in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.05)


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
