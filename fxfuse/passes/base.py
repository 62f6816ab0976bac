"""What a pass is: a frozen dataclass whose fields are its options, which rewrites a graph and reports what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar

from fxfuse.errors import OptionError
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.verify import Claim, Verifier


@dataclass(frozen=True)
class Edit:
    """One thing that a pass did, or refused to do: to which branches, what, and why or what came of it."""

    branches: tuple[str, ...]
    action: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.action} {' + '.join(self.branches)}" + (f": {self.detail}" if self.detail else "")


@dataclass
class PassReport:
    """What one pass did to one graph and what it left alone, with reasons; ``explain``, logs and tests print it."""

    name: str
    done: list[Edit] = field(default_factory=list)
    refused: list[Edit] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)

    def __bool__(self) -> bool:
        return bool(self.done)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.done)} done, {len(self.refused)} refused"]
        lines += [f"  {edit}" for edit in self.done]
        lines += [f"  refused: {edit}" for edit in self.refused]
        return "\n".join(lines)


@dataclass
class Control:
    """What all passes over one graph have to obey.

    Attributes:
        verifier: checks what they claim, if that is asked for.
        fuel: how many rewrites they may still make; None for any number.
    """

    verifier: Verifier | None = None
    fuel: int | None = None

    def take(self, wanted: int) -> int:
        """How many of the rewrites that are wanted may be made."""
        if self.fuel is None:
            return wanted
        taken = min(wanted, self.fuel)
        self.fuel -= taken
        return taken


class Pass(ABC):
    """One rewrite of a graph in canonical form; a subclass is a frozen dataclass of its options.

    Attributes:
        name: what reports, logs and dumps call it.
        canonical: whether it needs the graph in canonical form; the one that brings it there does not.
    """

    name: ClassVar[str]
    canonical: ClassVar[bool] = True

    @abstractmethod
    def run(self, graph: Canonical, control: Control) -> PassReport:
        """Rewrite ``graph`` in place; what was done and what was refused."""


class Rewrite(Protocol):
    """One thing that a fusion can do: to which branches, and what it comes to."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def detail(self) -> str: ...


R = TypeVar("R", bound=Rewrite)


class Fusion(Pass, Generic[R]):
    """A pass that makes exact rewrites, each of which can be left out and be verified.

    Attributes:
        verb, done: what it does to branches, and has done, as words of its report.
        product: what it makes of them.
    """

    verb: ClassVar[str]
    done: ClassVar[str]
    product: ClassVar[str]

    @abstractmethod
    def find(self, graph: Canonical, report: PassReport) -> Sequence[R]:
        """What can be done, in stream order; ``report`` learns what cannot, and why."""

    @abstractmethod
    def write(self, graph: Canonical, rewrites: Sequence[R]) -> Iterator[tuple[R, Claim]]:
        """Make the rewrites. Each is yielded while what was made and what it replaces stand in the graph both."""

    def run(self, graph: Canonical, control: Control) -> PassReport:
        """Find, and write as much as the fuel allows; verify each if that is asked for."""
        report = PassReport(self.name)
        rewrites = self.find(graph, report)
        count = control.take(len(rewrites))
        report.done += [Edit(rewrite.names, self.done, rewrite.detail) for rewrite in rewrites[:count]]
        report.refused += [Edit(rewrite.names, self.verb, "max_rewrites is spent") for rewrite in rewrites[count:]]
        claims = self.write(graph, rewrites[:count]) if count else iter(())
        for rewrite, claim in claims:
            if control.verifier is not None:
                control.verifier.check(claim, self.product, rewrite.names)
        return report


def check_fuel(max_rewrites: int | None) -> None:
    """Raise OptionError for a number of rewrites that is none."""
    if max_rewrites is not None and max_rewrites < 0:
        raise OptionError(f"max_rewrites is a number of rewrites, 0 or more, not {max_rewrites}")
