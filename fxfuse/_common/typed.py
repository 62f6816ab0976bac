"""What JSON says, as the dataclasses it was made of: each value of the type that it is annotated with, or an error."""

from __future__ import annotations

import json
from functools import cache
from typing import TypeVar, cast

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def typed(kind: type[T], value: object, what: str = "") -> T:
    """``value`` as a ``kind``: lists may stand for tuples and whole numbers for others, and nothing else for another.

    Whole numbers are those that tensors count with: 64 bits, with a sign.

    Args:
        kind: a dataclass, or a collection of some. Keys that none of its fields has are an error where its
            ``__pydantic_config__`` says so.
        value: what :func:`json.loads` gave.
        what: names it in errors.

    Raises:
        ValueError: it is none; the message says where.
    """
    text = json.dumps(value)
    json.loads(text, parse_int=_counted)
    try:
        adapter = _adapter(kind)  # type: ignore[arg-type]  # types can be hashed
        return cast(T, adapter.validate_json(text, strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in (what, *first["loc"]))
        raise ValueError(f"{where[1:] or 'it'}: {first['msg']}, got {str(first['input'])[:80]!r}") from error


def _counted(digits: str) -> int:
    if not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError(f"a whole number of {len(digits)} digits is more than any count")
    return number


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)
