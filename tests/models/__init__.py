"""Random residual models in plain torch, an eager reference of what a plan does to them, and strategies for both."""

from tests.models.capture import as_tuple, capture, exported
from tests.models.checks import assert_exact, error
from tests.models.model import ResidualModel, build, make_input
from tests.models.reference import reference

__all__ = [
    "ResidualModel",
    "as_tuple",
    "assert_exact",
    "build",
    "capture",
    "error",
    "exported",
    "make_input",
    "reference",
]
