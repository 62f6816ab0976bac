"""Text that a model writes itself: for users without a corpus, and of all kinds that the model knows."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fxfuse._common.bounds import check_count
from fxfuse._common.progress import bar
from fxfuse.data.batches import Batch, cache_keyword, call, eval_mode, logits_of
from fxfuse.errors import RecordError

SELF = "self"
"""Stands for text that the model writes itself where batches are asked for."""


def written_by(
    model: nn.Module,
    tokens: int,
    length: int = 256,
    batch: int = 64,
    rows: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> list[Batch]:
    """Sequences sampled from ``model`` at temperature 1, each begun with a token drawn from the whole vocabulary.

    Source: LLM-QAT (arXiv 2305.17888, section 3.1), which heals quantized models on text of their own.

    Args:
        model: a language model that is called with ``input_ids``. One that has ``generate`` writes by it, with a KV
            cache; another one is called on the whole text for each token.
        tokens: how many at least, the first of each sequence included.
        length: tokens in a sequence.
        batch: sequences that are written at a time.
        rows: sequences in a batch that is returned; the last one may be smaller.
        seed: of the draws; the same one writes the same text. The global generators stay as they are.
        progress: show on stderr how far it is.

    Returns:
        Batches ``{"input_ids": [rows, length]}``; for a model that takes a KV cache, with ``"use_cache": False``.

    Raises:
        RecordError: the model cannot be called with ``input_ids``, or returns no logits.
        OptionError: a size out of range.
    """
    for name, size in (("tokens", tokens), ("length", length), ("batch", batch), ("rows", rows)):
        check_count(name, size)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    made: list[Tensor] = []
    with torch.random.fork_rng(devices), eval_mode(model), bar("writing", "tokens", tokens, progress) as advance:
        torch.manual_seed(seed)
        written = 0
        while written < tokens:
            made.append(_write(model, min(batch, -(-(tokens - written) // length)), length))
            written += made[-1].numel()
            advance(made[-1].numel())
    more: dict[str, object] = {"use_cache": False} if _caches(model) else {}
    return [{"input_ids": part, **more} for part in torch.split(torch.cat(made), rows)]


def _write(model: nn.Module, rows: int, length: int) -> Tensor:
    device = next(model.parameters()).device
    vocabulary = _logits(model, torch.zeros(1, 1, dtype=torch.int64, device=device)).shape[-1]
    ids = torch.randint(vocabulary, (rows, 1), device=device)
    generate = getattr(model, "generate", None)
    if callable(generate) and _caches(model):
        made = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=vocabulary,  # no token: a text that ends is followed by another one
            max_new_tokens=length - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )
        assert isinstance(made, Tensor)
        return made
    while ids.shape[1] < length:
        chances = torch.softmax(_logits(model, ids)[:, -1].float(), -1)
        ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
    return ids


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = logits_of(call(model, 0, {"input_ids": ids}))
    if logits is None:
        raise RecordError("the model returned no logits, so it cannot write a text: give batches of your own")
    return logits


def _caches(model: nn.Module) -> bool:
    """Whether the model takes a KV cache as those of transformers do."""
    return {cache_keyword(model), "use_cache"} <= set(inspect.signature(type(model).forward).parameters)
