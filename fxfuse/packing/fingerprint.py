"""Whether tensors still hold what they held: samples of their bits, looked at again at every call.

A write through ``p.data``, numpy or an inference tensor leaves no trace but in the values. Comparing all of them costs
as much as using them, so a call looks at some, in two operations whatever the number of tensors:

- all of the smallest tensors (`AT_ONCE` bytes together), and of every other one a short stretch, another one each time
  (`STRETCH`);
- some numbers along lines through the large tensors (`ALONG`): a line meets every row and every column of its tensor.

Where all of them are small together (`TOGETHER`), a call looks at everything.

So an edit of one of the smallest tensors is seen at once, and so is any that leaves few values of a tensor as they
were. One of no more than a row or a column is seen when its line has had its turn: the more tensors, the later. Bits
are compared, so NaN equals NaN.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TOGETHER = 1 << 20
"""Bytes of all tensors together up to which every call looks at all of them, whole."""

WHOLE = 16 << 10
"""Bytes up to which a tensor is looked at as a whole, at once or in `PHASES` pieces."""

AT_ONCE = 16 << 10
"""Bytes of whole tensors that each call looks at; of the others that are small, a piece."""

STRETCH = 64
"""Bytes of a larger tensor that each call looks at."""

PHASES = 16
"""The stretches of a tensor that are looked at in turn."""

ALONG = 256
"""Numbers along lines that each call looks at."""

_LINES = 4
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
        values: its bits, as a view in the order of memory.
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
        self.values = values = _in_order_of_memory(bits(tensor.detach()))
        small = self.nbytes <= WHOLE
        if values.is_contiguous():
            flat = values.view(-1)
            self.stretches = (flat.view(torch.uint8),) if small else _stretches(flat.view(torch.uint8))
            lines = [] if small else [[line] for line in _diagonals(flat, values.shape[-1])]
        else:
            self.always = (_Sample.of(values if small else _corner(values)),)
            lines = [] if small else _rows_and_columns(values)
        self.lines = tuple(
            tuple(_Sample.of(piece) for view in line for piece in torch.split(view, ALONG)) for line in lines
        )
        self.take()

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

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
        self._views = tuple(view.contiguous().view(torch.uint8) if view.dim() == 0 else view for view in views)
        self._seen = torch.empty(0)

    def take(self) -> None:
        self._seen = torch.cat([view.reshape(-1).view(torch.uint8) for view in self._views])

    def same(self) -> bool:
        return torch.equal(torch.cat([view.reshape(-1).view(torch.uint8) for view in self._views]), self._seen)


class _Words:
    """Words of the processor's memory, and what they were: one operation reads them, another compares them.

    To name a tensor for each place costs ten times as much as to read the place: so all are read by their addresses.
    """

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._held = tuple(views)  # so that the memory stays what it is
        self._places = torch.unique(torch.cat([_words_of(view) for view in views]))
        self._now, self._seen = (torch.empty(len(self._places), dtype=torch.int64) for _ in range(2))

    def take(self) -> None:
        torch.index_select(_memory(), 0, self._places, out=self._seen)

    def same(self) -> bool:
        torch.index_select(_memory(), 0, self._places, out=self._now)
        return torch.equal(self._now, self._seen)


_FIRST, _LAST = 1 << 12, 1 << 48  # the addresses that a process may have


@cache
def _memory() -> Tensor:
    """All that this process could address, as one tensor of words, of which only places that tensors own are read."""
    everything = (ctypes.c_char * (_LAST - _FIRST)).from_address(_FIRST)
    return torch.frombuffer(everything, dtype=torch.int64)


def _words_of(view: Tensor) -> Tensor:
    """The places in :func:`_memory` of the words that hold ``view``, as far as they lie within its storage."""
    starts = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(view.shape, view.stride(), strict=True):
        steps = torch.arange(size) * stride * view.element_size()
        starts = (starts[:, None] + steps).flatten()
    storage = view.untyped_storage()
    first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    ends = [view.data_ptr() + starts, view.data_ptr() + starts + view.element_size() - 1]
    words = (torch.cat(ends) // 8).clamp(-(-first // 8), end // 8 - 1)
    return words - _FIRST // 8


def _can_be_read_by_address(view: Tensor) -> bool:
    """Whether ``view`` lies in the processor's memory, in words of its storage's own."""
    storage = view.untyped_storage()
    first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return view.device.type == "cpu" and -(-first // 8) < end // 8 and end < _LAST


def _looks(views: Sequence[Tensor]) -> list[_Row | _Words]:
    """What looks at ``views``."""
    by_address = [view for view in views if _can_be_read_by_address(view)]
    others = [view for view in views if not _can_be_read_by_address(view)]
    return [*([_Words(by_address)] if by_address else []), *([_Row(others)] if others else [])]


class Watch:
    """The fingerprints of some tensors of one device, for a look at all of them in each call."""

    def __init__(self, fingerprints: Sequence[Fingerprint]) -> None:
        self.fingerprints = tuple(fingerprints)
        self._device = self.fingerprints[0].device
        self._call = 0
        self._whole: list[_Row | _Words] = []
        self._phases: list[list[_Row | _Words]] = []
        self._turns: list[list[_Row | _Words]] = []
        if sum(each.nbytes for each in self.fingerprints) <= TOGETHER:
            self._whole = _looks([each.values for each in self.fingerprints])
        else:
            self._share()
        self.take()

    def _share(self) -> None:
        """Share out among the calls what is too much for each of them."""
        small = [each.stretches[0] for each in self.fingerprints if len(each.stretches) == 1]
        whole = [sample.view for each in self.fingerprints for sample in each.always]
        pieces: list[tuple[Tensor, ...]] = [each.stretches for each in self.fingerprints if len(each.stretches) > 1]
        left = AT_ONCE
        for flat in sorted(small, key=Tensor.numel):
            left -= flat.numel()
            if left >= 0:
                whole.append(flat)
            else:
                pieces.append(torch.tensor_split(flat, PHASES))
        self._whole = _looks(whole)
        self._phases = [_looks(views) for views in zip(*pieces, strict=True)]
        self._turns = [_looks(turn) for turn in _turns(self.fingerprints)]

    @property
    def round(self) -> int:
        """Calls after which everything that is looked at in turn has had its turn."""
        return max(1, len(self._phases), len(self._turns))

    def take(self) -> None:
        """Hold what the tensors hold now to be right."""
        for look in itertools.chain(self._whole, *self._phases, *self._turns):
            look.take()

    def same(self) -> bool:
        """Whether the samples whose turn it is are what they were."""
        if capturing(self._device):
            return True
        self._call += 1
        looks = [*self._whole]
        for turns in (self._phases, self._turns):
            looks += turns[self._call % len(turns)] if turns else []
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
    """A view of ``tensor``, of what it holds many times one, whose last dimension is the one that lies closest."""
    for dim in [dim for dim, stride in enumerate(tensor.stride()) if stride == 0]:
        tensor = tensor[(slice(None),) * dim + (slice(0, 1),)]
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


def _turns(fingerprints: Sequence[Fingerprint]) -> list[list[Tensor]]:
    """What each call looks at of the lines: first a line through every tensor, then the next through every one."""
    rounds = itertools.zip_longest(*(each.lines for each in fingerprints), fillvalue=())
    turns: list[list[Tensor]] = []
    room = 0
    for view in (sample.view for lines in rounds for line in lines for sample in line):
        room -= view.numel()
        if room < 0:
            turns.append([])
            room = ALONG - view.numel()
        turns[-1].append(view)
    return turns
