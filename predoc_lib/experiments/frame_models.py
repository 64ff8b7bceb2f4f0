"""What makes frames of features, of whatever kind, joined to the equation that predicts the features."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.experiments.yolo_clips import CONTEXT
from predoc_lib.frames import Critic, Heads, PlainDecoder
from predoc_lib.irevnet import IResNet, IRevNet, gather, scatter
from predoc_lib.yolo import FeatureODE
from predoc_lib.yolo.dynamics import Features

INVERTIBLE = (IRevNet, IResNet)


class Model(nn.Module):
    """What makes frames, and the equation that predicts the features.

    Args:
        maker: an ``IRevNet``, a ``PlainDecoder`` or a ``LastFrameDecoder``.
        ode: of the features; its units are the ones in which the maker sees them.
        end_to_end: the equation is trained, and kept with the weights.
        rest: an equation of the remainder, if it has its own.
        critic: of the made frames, if there is one.
        unit: of the features that the maker sees, for each channel's own: less is quieter.
    """

    def __init__(
        self,
        maker: nn.Module,
        ode: FeatureODE,
        end_to_end: bool = False,
        rest: FeatureODE | None = None,
        critic: Critic | None = None,
        unit: float = 1.0,
    ) -> None:
        super().__init__()
        self.maker, self.rest, self.critic, self.unit = maker, rest, critic, unit
        if end_to_end:
            self.ode = ode
        else:  # an attribute like any other: recorded already, it is no part of this model's weights
            object.__setattr__(self, "ode", ode.requires_grad_(False))

    def units(self, features: Heads) -> Heads:
        """Features as the maker sees them."""
        return [self.unit * x / scale for x, scale in zip(features, self.ode.scales, strict=True)]

    def own(self, images: Float[Tensor, "B 3 H W"]) -> Heads:
        """The features that an invertible network itself has of images, as the detector's would be."""
        parts = scatter(self.maker(images)[0], self.ode.shapes)
        return [x * scale / self.unit for x, scale in zip(parts, self.ode.scales, strict=True)]

    def predict(self, features: Features, ahead: Float[Tensor, " Q"]) -> Features:
        """Features so many frames ahead of the context's end."""
        t = torch.arange(float(CONTEXT), device=ahead.device)
        return self.ode.predict(features, t, CONTEXT - 1 + ahead)

    def frames(
        self, last: Float[Tensor, "B 2 3 H W"], features: Heads, wanted: Heads, remainder: Tensor | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """The frames whose features are wanted.

        Args:
            last: the last two frames seen.
            features: of the last of them.
            wanted: of the frame to make.
            remainder: an i-RevNet's; None: zeros.
        """
        features, wanted = self.units(features), self.units(wanted)
        if isinstance(self.maker, INVERTIBLE):
            return self.maker.inverse(gather(wanted), remainder)
        return self.maker(wanted) if isinstance(self.maker, PlainDecoder) else self.maker(last, features, wanted)

    def remainder(self, images: Float[Tensor, "B 3 H W"]) -> Tensor | None:
        """What an invertible network leaves over of images; other makers have none."""
        return self.maker(images)[1] if isinstance(self.maker, INVERTIBLE) else None

    def remainders_ahead(
        self, seen: Float[Tensor, "B 3 3 H W"], ahead: Float[Tensor, " Q"]
    ) -> Float[Tensor, "B Q r h w"]:
        """The remainders so many frames ahead, by their own equation, from those of the frames seen."""
        t = torch.arange(float(CONTEXT), device=ahead.device)
        remainders = self.remainder(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        return self.rest.predict([remainders.detach()], t, CONTEXT - 1 + ahead)[0]


def distance(model: Model, x: Heads, y: Heads) -> Float[Tensor, " B"]:
    """Mean squared difference of features, each channel in its unit."""
    parts = [((a - b) / scale).square().flatten(1) for a, b, scale in zip(x, y, model.ode.scales, strict=True)]
    return torch.cat(parts, 1).mean(1)
