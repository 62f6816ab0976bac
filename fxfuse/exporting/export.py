"""``fxfuse.export``: a model under its plan as a folder that others load, without fxfuse."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from fxfuse.errors import ExportError, nearest
from fxfuse.exporting.folder import new_folder, write_companions
from fxfuse.exporting.request import Request
from fxfuse.model import healed
from fxfuse.model.spread import spread_weights
from fxfuse.plan import Plan, edits_of

FORMATS: Mapping[str, str] = {
    "gguf": "fxfuse.exporting.gguf",
    "nemotron-nas": "fxfuse.exporting.nemotron_nas",
    "pt2": "fxfuse.exporting.pt2",
    "transformers": "fxfuse.exporting.transformers",
}
"""The modules of the formats. Each has ``prepare(request) -> write``, and ``write(folder)`` writes all but companions.

Whatever the format cannot say, ``prepare`` raises an :class:`ExportError` about, before anything is written.
"""

Write = Callable[[Path], None]


def export(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    format: str = "transformers",
    tokenizer: object = None,
    *,
    example: Mapping[str, object] | None = None,
    overwrite: bool = False,
    check: bool = True,
    progress: bool = False,
    **options: object,
) -> Path:
    """Write ``model`` as ``plan`` has it to a new folder, with tokenizer, generation config, plan and provenance.

    Weights are written one by one, and those of a wide FFN made as they are written. The folder appears when all of it
    is written.

    Args:
        model: a causal language model of Hugging Face, as it was before the plan, healed for it, or pruned.
        plan: the plan, or the path of one.
        folder: a new folder, or an empty one.
        format: "transformers" for any architecture, with a modelling file of its own; "nemotron-nas" for what is
            Llama-shaped, which engines serve natively; "gguf" for what is Llama-shaped, in llama.cpp; "pt2" for any
            architecture, compiled for this kind of machine, which torch runs from Python and C++.
        tokenizer: a Hugging Face tokenizer, whose files and chat template are written, too.
        example: the arguments of one call; by default a few tokens.
        overwrite: replace what is in ``folder``.
        check: load what was written and compare its logits with the planned model's, before the folder appears.
        progress: show how much is written.
        options: what only this format knows. Of "gguf": ``type`` of matrices, "f32", "f16", "bf16" or "q8_0", by
            default the model's; ``vocabulary``, a GGUF file to take it from instead of from the tokenizer.

    Returns:
        the folder.

    Raises:
        ExportError: the format cannot say this plan of this model, with the reason, before anything is written; the
            folder cannot be written; or what was written computes something else, a mistake of this library's.
        PlanError: the plan does not fit the model, or that was healed for another one.
        CaptureError: the model cannot be traced.
    """
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}{nearest(format, FORMATS, len(FORMATS))}")
    if spread := spread_weights(model):
        raise ExportError(f"{spread}: export it in one process, before it is sharded")
    edits = edits_of(plan)
    healed.check(model, edits)
    request = Request(model, edits, example or example_of(model), tokenizer, progress, check, options)
    write: Write = import_module(FORMATS[format]).prepare(request)
    with new_folder(folder, overwrite) as partial:
        write_companions(partial, model, edits, format, tokenizer)
        write(partial)
    return Path(folder)


def example_of(model: nn.Module) -> dict[str, object]:
    """Tokens all over the vocabulary, longer than a short attention window would hide."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise ExportError("this is no language model of Hugging Face: it has no token embeddings to call it with")
    tokens = torch.linspace(1, embedding.num_embeddings - 1, 32, device=embedding.weight.device).long()
    return {"input_ids": tokens[None], "use_cache": False}
