"""One packed tensor: made from weights, shared with them, taken apart into their gradients, and compared with them.

What changes in a weight shows in its address or its version, in samples of its values, or when a whole part of a pack
is compared with what it should be.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fxfuse._torch.autograd import same_version
from fxfuse._torch.collectives import local_tensor
from fxfuse._torch.dynamo import GUARDS_SEE_STRIDES
from fxfuse._torch.sources import mark_static_address
from fxfuse.graph.blocks import inner
from fxfuse.packing.fingerprint import Fingerprint, capturing
from fxfuse.packing.recipe import Part, Recipe
from fxfuse.packing.strategy import Weights, strategy_of

Stamp: TypeAlias = tuple[tuple[Hashable, ...], tuple[int, ...]]
_clock = time.perf_counter
_FIRST_AUDIT = 1.0  # seconds after packs were put to use
_address = Tensor.data_ptr
_version: Callable[[Tensor], int] = attrgetter("_version")


def plain(members: Sequence[Tensor]) -> list[Tensor]:
    """The plain tensors that hold the values of ``members``: what quantized ones are made of."""
    return [held for member in members for held in inner(member)]


def stamp(members: Sequence[Tensor]) -> Stamp:
    """What changes when one of these does: places and versions. Inference tensors have no version."""
    try:
        return _places(members), tuple(map(_version, members))
    except RuntimeError:
        return _places(members), tuple(map(_version_if_any, members))


def _places(members: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Where the members lie; a sharded one where its local tensor does, while it is its own version that counts."""
    addresses = tuple(map(_address, members))
    if 0 in addresses:
        addresses = tuple(_address(local_tensor(member)) for member in members)
    return addresses if GUARDS_SEE_STRIDES else tuple(zip(addresses, map(Tensor.stride, members), strict=True))


def _version_if_any(member: Tensor) -> int:
    try:
        return _version(member)
    except RuntimeError:
        return -1  # is_inference() does not tell: it is False once .data was set to an ordinary tensor


class Bound(Protocol):
    """Whoever uses packs, as long as its stamp is that of their members; ``running`` are its calls that do now."""

    stamp: Stamp | None
    running: set[object]


@contextmanager
def plain_tensors(device: torch.device) -> Iterator[None]:
    """Packs outlive the call that makes them: they are ordinary tensors, without gradients, in their own dtype."""
    known = torch.amp.is_autocast_available(device.type)
    autocast = torch.autocast(device.type, enabled=False) if known else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


class Pack:
    """A packed tensor and the weights that it is made of.

    Attributes:
        tensor: the packed values; always the same memory, as long as the members keep their dtypes and devices and
            nobody reads it while they change. Under ``"share"`` it moves when a member leaves it.
        ids: the identities of the members.
        fingerprints: of the tensors whose values it holds once more, by their identities: its members, and what
            quantized ones are made of.
    """

    def __init__(self, recipe: Recipe, members: Sequence[Tensor], weights: Weights) -> None:
        self.recipe, self._weights = recipe, weights
        self.ids = frozenset(map(id, members))
        self.fingerprints: dict[int, Fingerprint] = {}
        self._bounds: weakref.WeakSet[Bound] = weakref.WeakSet()
        self._device = members[0].device
        self._make(members)

    def _make(self, members: Sequence[Tensor]) -> None:
        seen = _seen(members)
        with plain_tensors(self._device):
            made = [part.compute(members).detach() for part in self.recipe.parts]
            self._sizes = [part.shape[self.recipe.dim] if part.dim() else 1 for part in made]
            self._strategy = strategy_of(made, self._weights)
            owners = [None if part.member is None else members[part.member] for part in self.recipe.parts]
            self.tensor = self._strategy.gather(made, owners, self.recipe.dim)
            self._regions = self._strategy.regions(self.tensor, self._sizes, self.recipe.dim)
        mark_static_address(self.tensor)
        self._settle(members, seen)
        self._look(members)

    def sync(self, members: Sequence[Tensor]) -> None:
        """Take over what changed in the members since the last time."""
        if self._stamped != stamp(plain(members)):
            self._repack(members)
        elif not all(fingerprint.same() for fingerprint in self.fingerprints.values()):
            with same_version(self.tensor):  # those of the members stayed as well
                self._repack(members)

    def holds(self, members: Sequence[Tensor]) -> bool:
        """Whether the members are where they were, and as new, when this was made of them."""
        return self._stamped == stamp(plain(members))

    def expire(self) -> None:
        """Let the next call pack anew."""
        self._stamped: Stamp | None = None
        for bound in list(self._bounds):
            bound.stamp = None

    def right(self, index: int, members: Sequence[Tensor]) -> bool:
        """Whether one part is, to the bit, what it would be now."""
        part, region = self.recipe.parts[index], self._regions[index]
        if self._shares(part, region, members):
            return True
        with plain_tensors(self._device):
            return self._strategy.same(region, part.compute(members))

    def serve(self, bound: Bound) -> None:
        """Let ``bound`` look at the members again whenever this pack changes."""
        self._bounds.add(bound)

    def _repack(self, members: Sequence[Tensor]) -> None:
        """Compute the packed values anew, in place where nobody else may hold that memory or reads it."""
        self.expire()  # before the question who is reading: whoever begins after it looks again
        stale = [
            (part, region)
            for part, region in zip(self.recipe.parts, self._regions, strict=True)
            if not self._shares(part, region, members)
        ]
        reading = any(bound.running for bound in list(self._bounds))
        if reading or (self._strategy.moves and any(part.member is not None for part, _ in stale)):
            self._make(members)
            return
        seen = _seen(members)
        self._look(members)
        with plain_tensors(self._device):
            for part, region in stale:
                self._strategy.write(region, part.compute(members))
        self._settle(members, seen)

    def _shares(self, part: Part, region: Tensor, members: Sequence[Tensor]) -> bool:
        return part.member is not None and self._strategy.shares(members[part.member], region)

    def _settle(self, members: Sequence[Tensor], seen: tuple[Stamp, Sequence[Tensor]]) -> None:
        for part, region in zip(self.recipe.parts, self._regions, strict=True):
            if part.member is not None and not self._shares(part, region, members):
                self._strategy.adopt(members[part.member], region)
        # The memory is held so that no other tensor can come to lie there.
        self._stamped, self._memory = _seen(members) if self._strategy.moves else seen

    def _look(self, members: Sequence[Tensor]) -> None:
        """Take the fingerprints of the members that were copied."""
        copied = {
            place
            for part, region in zip(self.recipe.parts, self._regions, strict=True)
            if not self._shares(part, region, members)
            for place in part.uses
        }
        before, self.fingerprints = self.fingerprints, {}
        with plain_tensors(self._device):
            for held in plain([members[place] for place in sorted(copied)]):
                known, own = before.get(id(held)), local_tensor(held)
                if known is not None and known.address == own.data_ptr():
                    known.take()
                else:
                    known = Fingerprint(own)
                self.fingerprints[id(held)] = known

    def gradients(self, members: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradient of the packed tensor, taken apart into those of the members that need one."""
        found: list[Tensor | None] = [None] * len(members)
        for part, own in zip(
            self.recipe.parts, self._strategy.split(gradient, self._sizes, self.recipe.dim), strict=True
        ):
            if part.member is not None:
                found[part.member] = _plus(found[part.member], own) if needed[part.member] else None
                continue
            with torch.enable_grad():
                leaves = [member.detach().requires_grad_(need) for member, need in zip(members, needed, strict=True)]
                value = part.compute(leaves)
            if not value.requires_grad:
                continue
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            for leaf, grad in zip(wanted, torch.autograd.grad(value, wanted, own, allow_unused=True), strict=True):
                index = next(i for i, each in enumerate(leaves) if each is leaf)
                if grad is not None:
                    found[index] = _plus(found[index], grad)
        return found


def _seen(members: Sequence[Tensor]) -> tuple[Stamp, Sequence[Tensor]]:
    """The stamp of the members, and the memory that it speaks of, even if another thread is changing them."""
    while True:
        before = stamp(plain(members))
        memory = [held.detach() for held in plain(members)]
        if stamp(plain(members)) == before:
            return before, memory


def _plus(sum_: Tensor | None, more: Tensor) -> Tensor:
    return more if sum_ is None else sum_ + more


class Audit:
    """Compares whole parts of packs with what they should be, one now and then, for a small share of the time."""

    def __init__(self, packs: Sequence[Pack], places: Sequence[Sequence[int]]) -> None:
        self._parts = [
            (pack, index, own)
            for pack, own in zip(packs, places, strict=True)
            for index in range(len(pack.recipe.parts))
        ]
        self._turn = 0
        self._due = _clock() + _FIRST_AUDIT

    def passes(self, members: Sequence[Tensor], share: float) -> bool:
        """Whether the part whose turn it is, if the time has come, is right."""
        start = _clock()
        if start < self._due or capturing(members[0].device):
            return True
        pack, index, places = self._parts[self._turn % len(self._parts)]
        right = pack.right(index, [members[place] for place in places])
        self._turn += 1
        self._due = start + (_clock() - start) / share
        return right
