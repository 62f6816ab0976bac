"""What a plan is to reach: time, memory, KV cache, and how much it may cost."""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse._common.bounds import check_bound
from fxfuse.errors import OptionError
from fxfuse.planning.costs import Costs
from fxfuse.planning.solvers.problem import Limit


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a plan must keep to; None asks for nothing.

    Attributes:
        latency: the time of a call, as a share of the original's (0.8 saves a fifth).
        memory: bytes of weights and KV cache together, at the batch and context of the costs.
        kv_bytes: bytes of KV cache, at these.
        kl: KL to the original, nats per token, as measured in the end.

    Raises:
        OptionError: a number out of range.
    """

    latency: float | None = None
    memory: float | None = None
    kv_bytes: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        check_bound("target_latency", self.latency, "a share of the original's time")
        check_bound("max_memory", self.memory, "a number of bytes")
        check_bound("max_kv_bytes", self.kv_bytes, "a number of bytes")
        check_bound("max_kl", self.kl, "a budget in nats per token")
        if self.latency is not None and not 0 < self.latency <= 1:
            raise OptionError(f"target_latency is a share of the original's time, 0..1, not {self.latency}")

    def __bool__(self) -> bool:
        """Whether the plan is to save anything."""
        return not (self.latency is None and self.memory is None and self.kv_bytes is None)

    def limits(self, costs: Costs) -> tuple[Limit, ...]:
        """The same as limits of a problem; that of KL is none, because predictions of it are not good enough."""
        made: list[Limit] = []
        if self.latency is not None:
            unit = costs.whole, " of the time"
            made.append(Limit("seconds", self.latency * costs.whole, "target_latency", unit))
        if self.memory is not None:
            made.append(Limit("memory", self.memory, "max_memory", (1e6, " MB")))
        if self.kv_bytes is not None:
            made.append(Limit("cache", self.kv_bytes, "max_kv_bytes", (1e6, " MB")))
        return tuple(made)
