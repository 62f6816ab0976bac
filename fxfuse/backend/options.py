"""The options of the backend, checked: torch.compile passes on whatever it is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeAlias, get_args

from torch import Tensor, fx

from fxfuse.errors import OptionError, alike, nearest
from fxfuse.packing.strategy import Weights
from fxfuse.passes.emit.kernel import Kernels
from fxfuse.plan import Plan, PlanFile, edits_of

Compiler: TypeAlias = Callable[[fx.GraphModule, list[Tensor]], Callable[..., object]]


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="ffnfuse", options={...})`` takes.

    Attributes:
        plan: a :class:`fxfuse.Plan`, or the path of one. None changes nothing that the model computes.
        inner: the compiler of the rewritten graph: a name that torch knows ("inductor", "aot_eager", "eager") or a
            function of a graph and example inputs.
        inner_options: inductor's own options, such as ``{"max_autotune": True}``.
        weights: "copy" keeps packed weights beside the model's own; "share" makes the model's own weights views of the
            packed ones: no second copy, but a batch of GEMMs instead of one, and only for FFNs of one width.
        kernels: what computes wide FFNs: "auto", fxfuse's Triton kernels on GPUs that can run them and ATen elsewhere;
            "fxfuse", its ops on every device; "aten", never.
        merge_gate_up: let FFNs that no plan fuses compute gate and up in one GEMM, at the price of a copy; on GPUs, in
            fxfuse's kernels where those are modelled to be faster than a vendor's GEMMs, as with few tokens.
        prepack: let linear maps on CPUs read weights in the layout of oneDNN's kernels, and those of one input be one,
            each where it is measured to be faster; only where no gradients are computed. It takes a copy of each such
            weight.
        strict: a name of the plan that no branch has is an error, not a warning.
        verify: compare all that is fused with what it replaces, in float64 on the inputs that a graph is made for; a
            difference is a :class:`fxfuse.errors.VerifyError`. For debugging: it takes much memory.
        max_rewrites: how many fusions to make at most in each graph, the first ones in stream order, to find by
            bisection the one that is at fault. None makes all.
        dump: a folder that gets, for each graph, the graph as Dynamo traced it and after each pass that changed it.
    """

    plan: Plan | PlanFile | None = None
    inner: str | Compiler = "inductor"
    inner_options: Mapping[str, object] = field(default_factory=dict)
    weights: Weights = "copy"
    kernels: Kernels = "auto"
    merge_gate_up: bool = False
    prepack: bool = False
    strict: bool = False
    verify: bool = False
    max_rewrites: int | None = None
    dump: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, object]) -> Options:
        """Check ``given``; a path of a plan is read here.

        Raises:
            OptionError: an unknown option, or a value of the wrong kind.
            PlanError: the plan's file is no plan.
        """
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                near = nearest(name, alike(name, known))
                raise OptionError(f"unknown option {name!r}{near}; there are: {', '.join(known)}")
        values = dict(given)
        plan = values.get("plan")
        if isinstance(plan, str | os.PathLike):
            values["plan"] = PlanFile(plan)
        elif plan is not None and not isinstance(plan, Plan | PlanFile):
            raise OptionError(f"option 'plan' is a fxfuse.Plan or the path of one, not {type(plan).__name__}")
        for name in ("merge_gate_up", "prepack", "strict", "verify"):
            if not isinstance(values.get(name, False), bool):
                raise OptionError(f"option {name!r} is True or False, not {values[name]!r}")
        most = values.get("max_rewrites")
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 0):
            raise OptionError(f"option 'max_rewrites' is a number of fusions, 0 or more, not {most!r}")
        if (dump := values.get("dump")) is not None:
            if not isinstance(dump, str | os.PathLike):
                raise OptionError(f"option 'dump' is the path of a folder, not {dump!r}")
            values["dump"] = os.fspath(dump)
        if values.get("weights", "copy") not in get_args(Weights):
            raise OptionError(f"option 'weights' is 'copy' or 'share', not {values['weights']!r}")
        if values.get("kernels", "auto") not in get_args(Kernels):
            raise OptionError(f"option 'kernels' is 'auto', 'fxfuse' or 'aten', not {values['kernels']!r}")
        if values.get("kernels") == "fxfuse" and values.get("weights") == "share":
            raise OptionError("option 'kernels': fxfuse's kernels read packed copies; leave out weights='share'")
        inner = values.get("inner", "inductor")
        if not isinstance(inner, str) and not callable(inner):
            raise OptionError(f"option 'inner' is the name of a backend or a function, not {inner!r}")
        inner_options = values.get("inner_options", {})
        if not isinstance(inner_options, Mapping):
            raise OptionError(f"option 'inner_options' is a dict, not {type(inner_options).__name__}")
        if inner_options and inner != "inductor":
            raise OptionError("option 'inner_options' is for inner='inductor'")
        return cls(**values)  # type: ignore[arg-type]  # each value's kind was checked above

    @property
    def edits(self) -> Plan:
        """The plan itself; an empty one if none was given."""
        return edits_of(self.plan)
