"""A U-Net (Ronneberger et al. 2015) that says of every pixel what it is, and whose bottleneck can be predicted.

The finest details go past the bottleneck, by skip connections: at a future time nobody has them, so they are those of
the last frame seen.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predoc_lib.frames import Frames, double, layer

SCALE = 8  # a cell of the bottleneck has 8 x 8 pixels


class UNet(nn.Module):
    """Classes of pixels.

    Args:
        classes: how many.
        width: channels of the bottleneck.
    """

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__()
        self.classes, self.width = classes, width
        self.down = nn.ModuleList([layer(12, 16), layer(16, 32, 2), layer(32, width, 2)])
        self.up = nn.ModuleList([layer(width + 32, 32), layer(32 + 16, 24)])
        self.leave = nn.Conv2d(24, 4 * classes, 3, padding=1)

    def encode(self, images: Frames) -> tuple[Float[Tensor, "B F h w"], list[Float[Tensor, "B _ _ _"]]]:
        """The bottleneck, and what goes past it, the coarser first.

        Raises:
            ValueError: sides that do not divide by 8.
        """
        if images.shape[2] % SCALE or images.shape[3] % SCALE:
            raise ValueError(f"Sides must divide by {SCALE}, got {list(images.shape)}: resize or pad the images.")
        first, second, third = self.down
        fine = first(F.pixel_unshuffle(images, 2))
        coarse = second(fine)
        return third(coarse), [coarse, fine]

    def decode(
        self, bottleneck: Float[Tensor, "B F h w"], skips: list[Float[Tensor, "B _ _ _"]]
    ) -> Float[Tensor, "B K H W"]:
        """The logarithms of the classes' odds."""
        x = bottleneck
        for up, skip in zip(self.up, skips, strict=True):
            x = up(torch.cat([double(x), skip], 1))
        return F.pixel_shuffle(self.leave(x), 2)

    def forward(self, images: Frames) -> Float[Tensor, "B K H W"]:
        """The same, of images."""
        return self.decode(*self.encode(images))
