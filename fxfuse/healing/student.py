"""The student: a copy of the model, under its plan, that owns what is trained and shares all else with the model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fxfuse._torch.apart import APART, forget, twin
from fxfuse._torch.compiled import set_compiled_call
from fxfuse._torch.dynamo import originals_forbidden, whole_under_ddp
from fxfuse.errors import HealError, MissingDependencyError
from fxfuse.plan import Plan

_ADAPTER = "default"


def student_of(model: nn.Module, trained: Collection[str], start: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of ``model`` with parameters of its own where they are trained, or ``start`` gives them other values.

    Elsewhere their memory is the model's.
    """
    start = start or {}
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for name, parameter in model.named_parameters()
        if name not in trained and name not in start
    }
    student = copy.deepcopy(model, memo)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in start:
            parameter.data.copy_(start[name])
    return student


def with_adapters(student: nn.Module, matrices: Sequence[str], settings: Mapping[str, object]) -> nn.Module:
    """``student`` with a LoRA adapter at each of the modules that hold ``matrices``; these stay as they are.

    Raises:
        MissingDependencyError: peft is not installed.
        HealError: peft knows no adapter for one of the modules, or not these settings.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft trains adapters: pip install 'fxfuse[heal]'") from error
    paths = [name.rpartition(".")[0] for name in matrices]
    try:
        made: nn.Module = peft.get_peft_model(student, peft.LoraConfig(target_modules=paths, bias="none", **settings))
    except (TypeError, ValueError) as error:
        raise HealError(f"peft refuses the adapters ({error}): try train='edited'") from error
    return made


def bare(student: nn.Module) -> nn.Module:
    """The model itself, adapters in it, without what peft wraps around it."""
    return student.get_base_model() if hasattr(student, "get_base_model") else student  # type: ignore[operator]


def whole(parameter: Tensor) -> Tensor:
    """The values of a parameter, of one that FSDP has sharded too: all processes must ask."""
    held = parameter.detach()
    return held.full_tensor() if isinstance(held, DTensor) else held


def values_of(student: nn.Module, trained: Collection[str]) -> dict[str, Tensor]:
    """The new values of the model's parameters, by their names in the model; those of adapters are merged."""
    own = bare(student)
    if own is student:
        return {name: whole(parameter) for name, parameter in student.named_parameters() if name in trained}
    made: dict[str, Tensor] = {}
    for path, module in own.named_modules():
        if _ADAPTER in getattr(module, "lora_A", {}):
            weight = module.get_parameter("base_layer.weight")
            delta: Tensor = module.get_delta_weight(_ADAPTER)
            made[f"{path}.weight"] = (weight + delta.to(weight)).detach()
    return made


@contextmanager
def under(student: nn.Module, plan: Plan, inner: str) -> Iterator[None]:
    """Inside, calls of ``student`` compute what ``plan`` says; nothing of what is compiled stays afterwards."""
    handle = twin(bare(student))
    options: Any = {"plan": plan, "inner": inner, "strict": True}  # torch types the values of inductor's options
    compiled = torch.compile(handle, backend="ffnfuse", options=options, **APART)

    def planned(*args: object, **kwargs: object) -> object:
        return compiled(*args, **kwargs)

    set_compiled_call(student, planned)
    try:
        with originals_forbidden(), whole_under_ddp():
            yield
    finally:
        set_compiled_call(student, None)
        forget(handle)
