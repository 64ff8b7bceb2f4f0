"""What goes into the models: data sets, embedded and real."""

from predoc_lib.data.catalog import DataError
from predoc_lib.data.digits import MovingDigits, moving_digits

__all__ = ["DataError", "MovingDigits", "moving_digits"]
