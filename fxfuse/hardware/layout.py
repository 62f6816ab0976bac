"""A model as a GPU sees it: which branches run after which, how many weights each reads, and what it keeps in a cache.

Numbers alone, so that a model of any size can be priced where its weights would not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, TypeAlias

from fxfuse.errors import PlanError, nearest
from fxfuse.plan import Plan, flat

Kind: TypeAlias = Literal["attention", "ffn", "linear"]


@dataclass(frozen=True)
class Shape:
    """One branch.

    Attributes:
        name: what a plan calls it.
        kind: attention, FFN or linear map.
        weights: numbers in its matrices.
        width: hidden units of an FFN.
        cache: numbers that an attention keeps of a token of one sequence, keys and values.
        heads: of keys and values; among so many GPUs at most the cache can be divided.
        joins: whether an FFN can be a part of a wide one.
    """

    name: str
    kind: Kind
    weights: int
    width: int = 0
    cache: int = 0
    heads: int = 1
    joins: bool = False


@dataclass(frozen=True)
class Part:
    """Branches that are added to the stream together: one all-reduce, and one wide FFN where ``fused``.

    Attributes:
        shapes: the branches, at least one.
        fused: they read one point, so that those FFNs that can are one.
        streams: how many copies of the stream they add to; what is added up between GPUs grows with it.
    """

    shapes: tuple[Shape, ...]
    fused: bool = False
    streams: int = 1

    @property
    def wide(self) -> tuple[Shape, ...]:
        """The FFNs that are one; none, or at least two."""
        found = tuple(shape for shape in self.shapes if shape.joins and self.fused)
        return found if len(found) > 1 else ()

    @property
    def run(self) -> tuple[Shape, ...]:
        """The branches as they run: those of the wide FFN as one."""
        wide = self.wide
        if not wide:
            return self.shapes
        joined = replace(
            wide[0],
            name="+".join(shape.name for shape in wide),
            weights=sum(shape.weights for shape in wide),
            width=sum(shape.width for shape in wide),
        )
        return (joined, *(shape for shape in self.shapes if shape not in wide))


@dataclass(frozen=True)
class Layout:
    """A decoder of tokens.

    Attributes:
        name: what it is called in tables.
        d: width of the stream.
        vocabulary: rows of the embedding and of the head.
        parts: in stream order.
        tied: embedding and head are one matrix.
    """

    name: str
    d: int
    vocabulary: int
    parts: tuple[Part, ...]
    tied: bool = False

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All branches, in stream order."""
        return tuple(shape for part in self.parts for shape in part.shapes)

    @property
    def weights(self) -> int:
        """Numbers in all matrices, those of embedding and head included."""
        return sum(shape.weights for shape in self.shapes) + self.d * self.vocabulary * (1 if self.tied else 2)


def planned(layout: Layout, plan: Plan) -> Layout:
    """The layout of a model under ``plan``.

    Raises:
        PlanError: it names a branch that there is not, makes something linear that is no attention, or narrows what is
            no FFN of so many units.
    """
    shapes = {shape.name: shape for shape in layout.shapes}
    for name in plan.names:
        if name not in shapes:
            raise PlanError(f"{layout.name} has no branch {name!r}{nearest(name, shapes)}")
    for name in plan.linear:
        if shapes[name].kind != "attention":
            raise PlanError(f"{name!r} is in linear, and no attention but {shapes[name].kind}")
        shapes[name] = Shape(name, "linear", layout.d**2)
    for name, units in plan.narrow.items():
        ffn = shapes[name]
        if ffn.kind != "ffn" or len(units) > ffn.width:
            raise PlanError(
                f"{name!r} is to keep {len(units)} hidden units, and is of kind {ffn.kind} with {ffn.width}"
            )
        shapes[name] = replace(ffn, width=len(units), weights=ffn.weights * len(units) // ffn.width)
    order = {name: place for place, name in enumerate(shapes)}
    groups = {min(flat(group), key=order.__getitem__): group for group in plan.parallel}
    gone = {*plan.drop, *(name for group in plan.parallel for name in flat(group))}
    return replace(layout, parts=tuple(_parts(layout, shapes, groups, gone)))


def _parts(
    layout: Layout,
    shapes: Mapping[str, Shape],
    groups: Mapping[str, Sequence[str | tuple[str, ...]]],
    gone: set[str],
) -> Iterator[Part]:
    """What is left of each part, and each group before the part in which its first member stood."""
    for part in layout.parts:
        for shape in part.shapes:
            if shape.name in groups:
                yield from _stages(groups[shape.name], shapes)
        if kept := tuple(shapes[shape.name] for shape in part.shapes if shape.name not in gone):
            yield replace(part, shapes=kept)


def _stages(group: Sequence[str | tuple[str, ...]], shapes: Mapping[str, Shape]) -> Iterator[Part]:
    """The members of a group side by side: of private sequences first all their first branches, then the second ones.

    Each sequence has a stream of its own, so only branches that are members themselves read one point.
    """
    members = [(member,) if isinstance(member, str) else member for member in group]
    alone = all(len(member) == 1 for member in members)
    for stage in zip_longest(*members):
        together = tuple(shapes[name] for name in stage if name is not None)
        yield Part(together, fused=alone, streams=1 if alone else len(together))
