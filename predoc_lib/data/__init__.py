"""What goes into the models: data sets, embedded and real."""

from predoc_lib.data.catalog import DataError
from predoc_lib.data.digits import MovingDigits, moving_digits
from predoc_lib.data.images import image_set
from predoc_lib.data.photos import photos

__all__ = ["DataError", "MovingDigits", "image_set", "moving_digits", "photos"]
