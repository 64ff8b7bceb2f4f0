"""What the tests share."""

import hypothesis
import jaxtyping
import pytest
import torch

# No deadline: the machine may be busy. Derandomized: the same examples every time.
hypothesis.settings.register_profile("book", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("book")


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture
def as_shipped():
    """Shape checks off, as they are for users: bad input then meets the library's own sentences."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
