"""Video as transport: images that are warped along a velocity field (report, section 5.4)."""

from predoc_lib.flow_warp.fit import fit_clip, fit_pair
from predoc_lib.flow_warp.model import WarpODE
from predoc_lib.flow_warp.transport import advect, compose, inside, invert, pixels, sampled, trace, warp

__all__ = [
    "WarpODE", "advect", "compose", "fit_clip", "fit_pair", "inside", "invert", "pixels", "sampled", "trace", "warp",
]  # fmt: skip
