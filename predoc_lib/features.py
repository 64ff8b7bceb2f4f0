"""What sets of images are compared by: features of a small classifier, or Inception's if its weights are there."""

import hashlib

from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from predoc_lib.data import catalog

INCEPTION = "inception/pt_inception-2015-12-05-6726825d.pth"
SIDE = 32


class SmallNet(nn.Module):
    """A classifier of small colour images; ``forward`` gives the 128 features that its last layer sees.

    Images of any size are resized to 32 x 32, as Inception resizes them to 299 x 299.

    Args:
        classes: how many.
    """

    num_features = 128  # torchmetrics asks for it

    def __init__(self, classes: int = 10) -> None:
        super().__init__()

        def layer(c: int, d: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c, d, 3, stride, 1), nn.GroupNorm(8, d), nn.SiLU())

        self.body = nn.Sequential(
            layer(3, 32), layer(32, 32), layer(32, 64, 2), layer(64, 64), layer(64, 128, 2), layer(128, 128)
        )
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 128"]:
        """The mean over positions of the last layer's 128 channels."""
        x = images.to(self.head.weight.dtype) / 127.5 - 1
        if x.shape[-2:] != (SIDE, SIDE):
            x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.body(x).mean((2, 3))

    def logits(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B classes"]:
        """Of the classes."""
        return self.head(self.forward(images))


def inception() -> nn.Module:
    """Inception v3 with the weights of the FID: uint8 images [B, 3, H, W] -> features [B, 2048].

    Raises:
        catalog.DataError: its weights are not there, or damaged.
    """
    file = catalog.root() / INCEPTION
    wanted = file.stem.rpartition("-")[2]
    if not file.is_file():
        raise catalog.DataError(
            f"Inception's weights are not there: {file} not found. Get {file.name} from the releases of "
            "github.com/mseitzer/pytorch-fid, or use the features of predoc_lib.experiments.features.load instead."
        )
    with file.open("rb") as opened:
        if not hashlib.file_digest(opened, "sha256").hexdigest().startswith(wanted):  # before it is unpickled
            raise catalog.DataError(f"{file} is damaged: its sha256 does not start with {wanted}. Copy it again.")
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
