"""Numbers that a user gives, checked where they come in: what is wrong with one is said by its name."""

from __future__ import annotations

from numbers import Integral, Real

from fxfuse.errors import OptionError


def check_count(name: str, value: object) -> None:
    """See that ``value`` is a whole number of at least 1, or None.

    Raises:
        OptionError: it is not.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{name} is a whole number, not {value!r}")
    if value < 1:
        raise OptionError(f"{name} must be at least 1, not {value}")


def check_bound(name: str, value: object, what: str) -> None:
    """See that ``value`` is a number that is not negative, or None; ``what`` says what the number is of.

    Raises:
        OptionError: it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0):
        raise OptionError(f"{name} is {what}, not {value!r}")
