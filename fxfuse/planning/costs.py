"""What a plan saves: time, memory and KV cache, from the cost of every branch, measured here or modelled for a GPU.

Measured by :func:`measure_costs`, at the user's batch, context and phase, under the compiler that will be used (Puzzle,
arXiv 2411.19146, measures so). Modelled by :func:`fxfuse.planning.modelled.model_costs`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict
from torch import Tensor, nn

from fxfuse._common.files import write_atomically
from fxfuse._common.typed import typed
from fxfuse._torch.compiled import original
from fxfuse.bench.branches import BranchTime, Phase, time_branches
from fxfuse.bench.timing import A_A_LIMIT, Machine
from fxfuse.errors import PlanError, RecordError, nearest
from fxfuse.plan import Group, Plan


@dataclass(frozen=True)
class Use:
    """What a model needs, or what an edit saves of it.

    Attributes:
        seconds: of a call.
        memory: bytes of weights and KV cache.
        cache: bytes of KV cache.
    """

    seconds: float = 0.0
    memory: float = 0.0
    cache: float = 0.0

    def __add__(self, other: Use) -> Use:
        return Use(self.seconds + other.seconds, self.memory + other.memory, self.cache + other.cache)

    def __sub__(self, other: Use) -> Use:
        return Use(self.seconds - other.seconds, self.memory - other.memory, self.cache - other.cache)


@dataclass(frozen=True)
class Costs:
    """The costs of a model's branches in one call of it; ``costs[name]`` is that of a branch.

    Attributes:
        whole: seconds of the call, compiled without a plan.
        memory: bytes of all weights.
        branches: in stream order, as :class:`fxfuse.bench.branches.BranchTime` tells them.
        phase: "decode" (one token after ``context``) or "prefill" (a prompt of ``context`` tokens).
        batch: sequences.
        context: tokens in each.
        where: the machine, or the GPU that was modelled.
        apart: relative difference of two copies of one program that took turns; 0 of modelled costs.
        modelled: whether nothing was measured.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    whole: float
    memory: int
    branches: tuple[BranchTime, ...]
    phase: Phase
    batch: int
    context: int
    where: str
    apart: float = 0.0
    modelled: bool = False

    @property
    def void(self) -> bool:
        """Whether the machine was too busy for what was measured to mean much."""
        return self.apart > A_A_LIMIT

    @property
    def original(self) -> Use:
        """What the model needs without a plan."""
        cache = sum(branch.cache for branch in self.branches)
        return Use(self.whole, self.memory + cache, cache)

    def __getitem__(self, name: str) -> BranchTime:
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise PlanError(f"there are no costs of a branch {name!r}{nearest(name, (b.name for b in self.branches))}")

    def of(self, plan: Plan) -> Use:
        """What the model needs under ``plan``, predicted: savings add up."""
        return self.original - self.gain(plan)

    def gain(self, plan: Plan) -> Use:
        """What ``plan`` saves.

        A group of FFNs of one kind saves what was measured of its size; of a larger one, as much for each further
        member as the last one measured. Other groups, whole blocks among them, save all all-reduces but one of what
        their members add last; on one device they compute what they did, and save nothing. A unit
        that a narrowed FFN does not keep saves what one more of them adds: the time of two such FFNs as one, less that
        of one alone, over their width; and no more than its share of the FFN's own.

        Raises:
            PlanError: a branch of the plan has no costs.
        """
        total = Use()
        for name in plan.drop:
            branch = self[name]
            total += Use(branch.seconds, branch.parameters + branch.cache, branch.cache)
        for name in plan.linear:
            branch = self[name]
            if branch.linear is None:
                raise PlanError(f"{name!r} has no costs as a linear map: none fits in its place")
            less = branch.parameters - branch.linear_parameters
            total += Use(branch.seconds - branch.linear, less + branch.cache, branch.cache)
        for name, units in plan.narrow.items():
            branch = self[name]
            if not branch.width or len(branch.groups) < 2:
                raise PlanError(
                    f"{name!r} has no costs as a narrowed FFN: they are told by the time of two FFNs as one, so "
                    "measure costs with max_group of 2 or more"
                )
            gone = branch.width - len(units)
            whole = min(max(0.0, branch.groups[1] - branch.groups[0]), branch.seconds)
            total += Use(whole * gone / branch.width, gone * branch.unit_parameters)
        return sum((Use(self._saved(group)) for group in plan.parallel), total)

    def _saved(self, group: Group) -> float:
        """Seconds that a group saves."""
        members = [self[member if isinstance(member, str) else member[-1]] for member in group]
        wide = all(isinstance(member, str) for member in group) and all(len(member.groups) > 1 for member in members)
        if wide:
            return sum(_saved(member, len(group)) for member in members) / len(members)
        return sum(member.reduction for member in members) * (len(members) - 1) / len(members)

    def to_json(self) -> str:
        """All of it, as a JSON object."""
        return json.dumps(asdict(self), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, atomically."""
        write_atomically(path, f"{self.to_json()}\n".encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Costs:
        """Read what :meth:`save` wrote.

        Raises:
            RecordError: there is no such file, or it holds something else.
        """
        try:
            return typed(cls, json.loads(Path(path).read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(f"{os.fspath(path)!r} holds no costs ({error}): measure them again") from error


def _saved(branch: BranchTime, size: int) -> float:
    """Seconds that ``size`` branches like this one save as one group."""
    times = branch.groups
    if size <= len(times):
        return size * times[0] - times[size - 1]
    last = times[0] - (times[-1] - times[-2])
    return len(times) * times[0] - times[-1] + (size - len(times)) * last


def measure_costs(
    model: nn.Module,
    ids: Tensor,
    phase: Phase = "decode",
    *,
    max_group: int = 4,
    inner: str = "inductor",
    repeats: int = 15,
    progress: bool = False,
) -> Costs:
    """Measure what the branches of ``model`` cost here; see :func:`fxfuse.bench.branches.time_branches`.

    Args:
        model: a language model, called as Hugging Face models are.
        ids: tokens ``[batch, context]``: the prompt, or what the KV cache holds.
        phase: "prefill", or "decode", a call of one more token.
        max_group: FFNs in the largest group that is measured.
        inner: the compiler.
        repeats: rounds.
        progress: show on stderr how far it is.

    Raises:
        OptionError, CaptureError, FxfuseError: as said there.
    """
    times = time_branches(model, ids, phase, max_group=max_group, inner=inner, repeats=repeats, progress=progress)
    batch, context = ids.shape
    memory = _bytes([*original(model).parameters(), *original(model).buffers()])
    where = str(Machine.here())
    return Costs(times.whole, memory, times.branches, phase, batch, context, where, times.apart)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
