"""The report that every pass returns."""

from __future__ import annotations

from dataclasses import dataclass, field


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

    def __bool__(self) -> bool:
        return bool(self.done)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.done)} done, {len(self.refused)} refused"]
        lines += [f"  {edit}" for edit in self.done]
        lines += [f"  refused: {edit}" for edit in self.refused]
        return "\n".join(lines)
