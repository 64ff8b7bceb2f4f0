"""Multi-scale continuous normalizing flows of images (report, chapter 6)."""

from predoc_lib.msflow.logit import from_logit, quantize, to_logit
from predoc_lib.msflow.model import MSFlow

__all__ = ["MSFlow", "from_logit", "quantize", "to_logit"]
