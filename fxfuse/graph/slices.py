"""Slices of the last dimension, in every spelling: chunk, split, narrow, ``x[..., a:b]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fxfuse.graph.ops import op
from fxfuse.graph.values import shape


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix: a slice with known bounds, and hashable, as slices are not before Python 3.12."""

    start: int
    stop: int
    step: int = 1

    @classmethod
    def of(cls, cut: slice, width: int) -> Rows:
        """Those that ``cut`` takes of so many."""
        return cls(*cut.indices(width))

    @property
    def cut(self) -> slice:
        return slice(self.start, self.stop, self.step)

    @property
    def count(self) -> int:
        return len(range(self.start, self.stop, self.step))


_Cut = Callable[[int], Rows]


def last_dim_part(node: fx.Node) -> tuple[fx.Node, _Cut] | None:
    """``(whole, rows)`` if ``node`` is a slice of ``whole``'s last dimension: ``rows`` maps its width to a range."""
    found = op(node)
    if found is None:
        return None
    if found.name == "getitem":
        source, index = found.node("input"), found.args.get("index")
        if source is None:
            return None
        parts = op(source)
        if isinstance(index, int) and parts is not None and (whole := parts.node("input")) is not None:
            if parts.name == "chunk" and is_last(parts.args.get("dim", 0), whole):
                return whole, lambda width: _chunk(width, parts.args.get("chunks"), index)
            if parts.name == "split" and is_last(parts.args.get("dim", 0), whole):
                return whole, lambda width: _split(width, parts.args.get("sizes"), index)
            sections = parts.args.get("sections")
            if parts.name == "tensor_split" and isinstance(sections, int) and is_last(parts.args.get("dim", 0), whole):
                return whole, lambda width: _tensor_split(width, sections, index)
            return None
        cut = _last_slice(index, source)
        return None if cut is None else (source, lambda width: Rows.of(cut, width))
    if (
        found.name == "slice"
        and (source := found.node("input")) is not None
        and is_last(found.args.get("dim", 0), source)
    ):
        bounds = [found.args.get(key) for key in ("start", "end", "step")]
        if all(bound is None or isinstance(bound, int) for bound in bounds):
            return source, lambda width: Rows.of(slice(*bounds), width)
    if (
        found.name == "narrow"
        and (source := found.node("input")) is not None
        and is_last(found.args.get("dim"), source)
    ):
        start, length = found.args.get("start"), found.args.get("length")
        if isinstance(start, int) and isinstance(length, int):
            return source, lambda width: Rows.of(slice(start, start + length), width)
    return None


def is_last(dim: object, node: fx.Node) -> bool:
    """Whether ``dim`` is the last dimension of ``node``, as far as that is known."""
    sizes = shape(node)
    return dim == -1 or (sizes is not None and dim == len(sizes) - 1)


def _chunk(width: int, chunks: object, index: int) -> Rows:
    assert isinstance(chunks, int)
    return _split(width, -(-width // chunks), index)


def _split(width: int, sizes: object, index: int) -> Rows:
    if isinstance(sizes, int):
        sizes = [min(sizes, width - start) for start in range(0, width, sizes)]
    assert isinstance(sizes, list | tuple)
    index = index % len(sizes)
    start = sum(sizes[:index])
    return Rows(start, start + sizes[index])


def _tensor_split(width: int, sections: int, index: int) -> Rows:
    """The first parts are longer by one where the width is no multiple."""
    least, longer = divmod(width, sections)
    return _split(width, [least + (part < longer) for part in range(sections)], index)


def _last_slice(index: object, node: fx.Node) -> slice | None:
    """The slice of the last dimension, if ``index`` takes everything of all others."""
    if not isinstance(index, tuple) or not index or not isinstance(index[-1], slice):
        return None
    leading = index[:-1]
    sizes = shape(node)
    complete = Ellipsis in leading or (sizes is not None and len(index) == len(sizes))
    if not complete or any(part is not Ellipsis and part != slice(None) for part in leading):
        return None
    cut = index[-1]
    bounds = (cut.start, cut.stop, cut.step)
    return cut if all(bound is None or isinstance(bound, int) for bound in bounds) else None
