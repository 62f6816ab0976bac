"""Batches of data and the calls they make of a model: what recording and evaluating have in common.

A batch is a mapping of the model's keyword arguments; any iterable of batches serves, a DataLoader for one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import innermost
from fxfuse.errors import FxfuseError, RecordError

Batch: TypeAlias = Mapping[str, object]

Model: TypeAlias = Callable[..., object]
"""A module, compiled or not, or a compiled function."""


@contextmanager
def eval_mode(*models: Model) -> Iterator[None]:
    """No gradients and ``model.eval()`` inside; afterwards every module's training flag is what it was."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    flags = [(module, module.training) for module in modules]
    try:
        for model in models:
            if isinstance(model, nn.Module):
                model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def check_batch(number: int, batch: object, tokens: bool = True) -> Batch:
    """``batch``, the ``number``-th from 0, which is a mapping and, if ``tokens``, holds a tensor ``input_ids``.

    Raises:
        RecordError: it is something else.
    """
    if not isinstance(batch, Mapping):
        raise RecordError(
            f"batch {number} is a {type(batch).__name__}, not a mapping of the model's keyword arguments; "
            'give {"input_ids": tensor, ...}'
        )
    if tokens and not isinstance(batch.get("input_ids"), Tensor):
        held = f"a {type(batch['input_ids']).__name__}" if "input_ids" in batch else f"only {_keys(batch)}"
        raise RecordError(f"batch {number} needs a tensor input_ids; it has {held}")
    return batch


def call(model: Model, number: int, batch: Batch) -> object:
    """``model(**batch)``, the batch's tensors moved to the model's device if it has just one.

    Raises:
        RecordError: the model raised; the message names the batch, the error is chained.
        FxfuseError: what the backend ``ffnfuse`` had to say about the model's plan, itself.
    """
    with blaming(number, batch):
        return model(**on_device_of(model, batch))


@contextmanager
def blaming(number: int, batch: Batch) -> Iterator[None]:
    """What a model raises inside is said of ``batch``, the ``number``-th; see :func:`call`."""
    with telling(f"the model cannot be called with batch {number} ({_keys(batch)})"):
        yield


@contextmanager
def telling(what: str) -> Iterator[None]:
    """An error inside becomes a RecordError that says ``what`` failed, and its reason; one of fxfuse's stays itself."""
    try:
        yield
    except Exception as error:
        reason = innermost(error)
        if isinstance(reason, FxfuseError):
            raise reason from error
        first = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
        raise RecordError(f"{what}: {type(reason).__name__}: {first}") from error


def fresh(batch: Batch) -> dict[str, object]:
    """``batch`` for one call of many: what may hold state, such as a KV cache, is a copy, which the call may fill."""
    return {name: value if is_data(value) else copy.deepcopy(value) for name, value in batch.items()}


def is_data(value: object) -> bool:
    """Whether ``value`` is tensors and numbers only, which a model reads and leaves as they are."""
    if isinstance(value, tuple | list):
        return all(map(is_data, value))
    if isinstance(value, dict):
        return all(map(is_data, value.values()))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def logits_of(output: object) -> Tensor | None:
    """The floating tensor ``[..., length, vocabulary]`` in what a model returned, or None.

    That is its ``logits`` if it is a mapping or an object that has them, the tensor itself, or a tuple's first tensor
    of three dimensions.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        output = next((each for each in output if _is_logits(each, 3)), None)
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and _is_logits(output, 2) else None


def cache_keyword(model: Model) -> str:
    """The name under which ``model``, compiled or not, takes a KV cache: transformers renames ``past_key_values``."""
    call = type(original(model)).forward if isinstance(model, nn.Module) else model
    return "cache" if "cache" in inspect.signature(call).parameters else "past_key_values"


def cache_of(output: object) -> object:
    """The KV cache in what a model returned, by either of its names, or None."""
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


def _is_logits(value: object, dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= dimensions


def _keys(batch: Mapping[str, object]) -> str:
    return ", ".join(map(str, batch)) or "nothing"


def on_device_of(model: Model, batch: Batch) -> dict[str, object]:
    """``batch`` with its tensors where the model's weights are, if all of those are in one place."""
    devices = {parameter.device for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
    if len(devices) != 1:
        return dict(batch)
    (device,) = devices
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
