"""Continuous-time models for video and images: the library behind the book."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("predoc-lib")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"
