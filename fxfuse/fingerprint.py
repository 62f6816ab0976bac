"""Whether tensors still hold what they held: samples of their bits, looked at again at every call.

A write through ``p.data``, numpy or an inference tensor leaves no trace but in the values. Comparing all of them costs
as much as using them, so a call looks at some, in two operations whatever the number of tensors:

- all of every small tensor (`WHOLE`), and of every other one a short stretch, another one each time (`STRETCH`);
- a line through some of the large tensors, whose turns come round in `ROUND` calls: it meets every row and every column
  of its tensor.

So an edit of a small tensor is seen at once, and so is any that leaves few values of a large one as they were. One of
no more than a row or a column of a large one is seen in `ROUND` calls. Bits are compared, so NaN equals NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE = 16 << 10
"""Bytes up to which a tensor is looked at as a whole."""

STRETCH = 64
"""Bytes of a larger tensor that each call looks at."""

PHASES = 16
"""The stretches of a tensor that are looked at in turn."""

ROUND = 128
"""Calls in which a line through each tensor is looked at."""

_LINES = 4
_LEAST, _PIECE = 1024, 1024  # numbers along lines that a call looks at, at least, and in one comparison, at most
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Sample:
    """Some of a tensor's bits, as a view of them, and what they were."""

    view: Tensor
    seen: Tensor

    @staticmethod
    def of(view: Tensor) -> _Sample:
        return _Sample(view, torch.empty(view.shape, dtype=view.dtype, device=view.device))

    def take(self) -> None:
        self.seen.copy_(self.view)

    def same(self) -> bool:
        return torch.equal(self.view, self.seen)


class Fingerprint:
    """Samples of the bits of one tensor as they were when last taken.

    Attributes:
        address: where the tensor lies. The samples hold on to that memory.
        stretches: of its bytes; one is looked at in each call.
        seen: what they were.
        always: samples that every call looks at, of a tensor whose values do not lie side by side.
        lines: samples that calls look at in turn. Each line meets every row and every column.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.address = tensor.data_ptr()
        self.device = tensor.device
        self.stretches: tuple[Tensor, ...] = ()
        self.always: tuple[_Sample, ...] = ()
        self.lines: tuple[tuple[_Sample, ...], ...] = ()
        values = _in_order_of_memory(bits(tensor.detach()))
        small = tensor.numel() * tensor.element_size() <= WHOLE
        if values.is_contiguous():
            flat = values.view(-1)
            self.stretches = (flat.view(torch.uint8),) if small else _stretches(flat.view(torch.uint8))
            lines = [] if small else [[line] for line in _diagonals(flat, values.shape[-1])]
        else:
            self.always = (_Sample.of(values if small else _corner(values)),)
            lines = [] if small else _rows_and_columns(values)
        self.lines = tuple(
            tuple(_Sample.of(piece) for view in line for piece in torch.split(view, _PIECE)) for line in lines
        )
        self.take()

    def take(self) -> None:
        """Hold what the tensor holds now to be right."""
        self.seen = torch.stack(self.stretches) if self.stretches else torch.empty(0)
        for sample in self._samples():
            sample.take()

    def same(self) -> bool:
        """Whether all samples are what they were."""
        if self.stretches and not torch.equal(torch.stack(self.stretches), self.seen):
            return False
        return all(sample.same() for sample in self._samples())

    def _samples(self) -> Iterable[_Sample]:
        return itertools.chain(self.always, *self.lines)


class _Row:
    """Some bytes side by side, and what they were: one operation puts them there, another compares them."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._views = tuple(views)
        length, device = sum(view.numel() for view in views), views[0].device
        self._words, self._seen = (torch.zeros(-(-length // 8), dtype=torch.int64, device=device) for _ in range(2))
        self._bytes, self._seen_bytes = (words.view(torch.uint8)[:length] for words in (self._words, self._seen))

    def take(self, seen: Sequence[Tensor]) -> None:
        torch.cat(tuple(seen), out=self._seen_bytes)

    def same(self) -> bool:
        torch.cat(self._views, out=self._bytes)
        return torch.equal(self._words, self._seen)


class Watch:
    """The fingerprints of some tensors of one device, for a look at all of them in each call."""

    def __init__(self, fingerprints: Sequence[Fingerprint]) -> None:
        self.fingerprints = tuple(fingerprints)
        self._device = self.fingerprints[0].device
        self._small = [each for each in self.fingerprints if len(each.stretches) == 1]
        self._large = [each for each in self.fingerprints if len(each.stretches) == PHASES]
        self._whole = [_Row([each.stretches[0] for each in self._small])] if self._small else []
        phases = range(PHASES if self._large else 0)
        self._phases = [_Row([each.stretches[phase] for each in self._large]) for phase in phases]
        self._always = [sample for each in self.fingerprints for sample in each.always]
        self._turns = _turns(self.fingerprints)
        self._call = 0
        self.take()

    def take(self) -> None:
        """Take over what the fingerprints have seen."""
        for row in self._whole:
            row.take([each.seen[0] for each in self._small])
        for phase, row in enumerate(self._phases):
            row.take([each.seen[phase] for each in self._large])

    def same(self) -> bool:
        """Whether the samples whose turn it is are what they were."""
        if capturing(self._device):
            return True
        self._call += 1
        looks: list[_Row | _Sample] = [*self._whole, *self._always]
        if self._phases:
            looks.append(self._phases[self._call % PHASES])
        if self._turns:
            looks += self._turns[self._call % len(self._turns)]
        return all(look.same() for look in looks)


def watches(fingerprints: Iterable[Fingerprint]) -> tuple[Watch, ...]:
    """One watch for each device."""
    by_device: dict[torch.device, list[Fingerprint]] = {}
    for each in fingerprints:
        by_device.setdefault(each.device, []).append(each)
    return tuple(map(Watch, by_device.values()))


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be asked for its value."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def bits(tensor: Tensor) -> Tensor:
    """The values of ``tensor`` as integers."""
    plain = tensor.conj() if tensor.is_conj() else tensor
    plain = torch.view_as_real(plain) if plain.dtype == torch.complex128 else plain
    return plain.view(_INTEGERS[plain.element_size()])


def _in_order_of_memory(tensor: Tensor) -> Tensor:
    """The view of ``tensor`` whose last dimension is the one that lies closest."""
    if tensor.dim() == 0:
        return tensor.view(1)
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim]))


def _stretches(flat: Tensor) -> tuple[Tensor, ...]:
    last = flat.numel() - STRETCH
    starts = [last * phase // (PHASES - 1) for phase in range(PHASES)]
    return tuple(flat.narrow(0, start, STRETCH) for start in starts)


def _diagonals(flat: Tensor, width: int) -> list[Tensor]:
    """Lines through a matrix of that width. A step as short as a row and prime to it meets all rows and all columns."""
    longest = min(width, flat.numel() // width)
    step = next(step for step in range(longest, 0, -1) if math.gcd(step, width) == 1)
    return [flat[start::step] for start in sorted({step * line // _LINES for line in range(_LINES)})]


def _rows_and_columns(values: Tensor) -> list[list[Tensor]]:
    """Lines where no step leads through the whole tensor: a row and a column of each of its matrices."""
    if values.dim() == 1:
        return [[values]]
    if values.dim() > 2:
        return [list(itertools.chain(*own)) for own in zip(*map(_rows_and_columns, values), strict=True)]
    places = [line / _LINES for line in range(_LINES)]
    return [[values[int(place * values.shape[0])], values[:, int(place * values.shape[1])]] for place in places]


def _corner(values: Tensor) -> Tensor:
    """The first row of a tensor, or some of it."""
    while values.dim() > 1:
        values = values[0]
    return values[:STRETCH]


def _turns(fingerprints: Sequence[Fingerprint]) -> list[tuple[_Sample, ...]]:
    """What each call looks at of the lines: first a line through every tensor, then the next through every one."""
    rounds = itertools.zip_longest(*(each.lines for each in fingerprints), fillvalue=())
    samples = [[sample for line in lines for sample in line] for lines in rounds]
    turns: list[tuple[_Sample, ...]] = []
    for own in samples:
        most = max(_LEAST, -(-sum(sample.view.numel() for sample in own) // ROUND))
        turn: list[_Sample] = []
        for sample in own:
            if turn and sum(each.view.numel() for each in turn) + sample.view.numel() > most:
                turns.append(tuple(turn))
                turn = []
            turn.append(sample)
        if turn:
            turns.append(tuple(turn))
    return turns
