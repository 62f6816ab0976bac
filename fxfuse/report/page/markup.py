"""Elements of HTML and SVG. Text and attributes are escaped when a page is written, so names cannot become markup."""

from __future__ import annotations

import math
import re
from typing import TypeAlias
from xml.etree.ElementTree import Element, tostring

Child: TypeAlias = "Element | str | None"
Attribute: TypeAlias = str | float | bool | None

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that no HTML document may hold: controls, and halves of surrogate pairs."""


def e(tag: str, *children: Child, **attributes: Attribute) -> Element:
    """An element; children that are None are left out.

    A trailing underscore of an attribute's name is dropped (``class_``) and the others become hyphens. None and False
    leave the attribute out, True leaves it empty, and a float is written with at most two decimals.
    """
    element = Element(tag)
    for name, given in attributes.items():
        if given is not None and given is not False:
            element.set(name.rstrip("_").replace("_", "-"), _text(given))
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            if last is None:
                element.text = (element.text or "") + _clean(child)
            else:
                last.tail = (last.tail or "") + _clean(child)
        elif child is not None:
            element.append(child)
            last = child
    return element


def raw(tag: str, text: str, **attributes: Attribute) -> Element:
    """A ``script`` or ``style``, whose text HTML reads as it stands.

    Raises:
        ValueError: ``text`` would end the element.
    """
    if "</" in text or "<!--" in text:
        raise ValueError(f"this text would end its {tag}")
    return e(tag, text, **attributes)


def html(element: Element) -> str:
    """The element as HTML."""
    return tostring(element, encoding="unicode", method="html")


def number(value: float | None, digits: int = 3) -> str:
    """A measured number for people to read: three digits, and words where nothing was measured."""
    if value is None or math.isnan(value):
        return "not measured"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def _text(given: str | float | bool) -> str:
    if isinstance(given, bool):
        return ""
    if isinstance(given, float):
        return f"{given:.2f}".rstrip("0").rstrip(".")
    return _clean(str(given))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
