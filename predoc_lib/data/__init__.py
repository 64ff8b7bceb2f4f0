"""What goes into the models: data sets, embedded and real."""

from predoc_lib.data.catalog import DataError
from predoc_lib.data.digits import MovingDigits, moving_digits
from predoc_lib.data.driving import driving
from predoc_lib.data.factors import factors
from predoc_lib.data.flow_pairs import flow_pairs
from predoc_lib.data.images import image_set
from predoc_lib.data.photos import photos
from predoc_lib.data.video import read_video

__all__ = [
    "DataError",
    "MovingDigits",
    "driving",
    "factors",
    "flow_pairs",
    "image_set",
    "moving_digits",
    "photos",
    "read_video",
]
