"""What no graph tells of a Llama-shaped model and its Hugging Face config does: rotary angles, positions, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fxfuse.errors import ExportError


@dataclass(frozen=True)
class Scalars:
    """Entries of a config.

    Attributes:
        rope: ``rope_theta`` and ``rope_parameters``, as transformers 5 has them; older readers take the former.
        positions: the longest sequence.
        tokens: those that begin, end and pad a sequence, as far as there are any.
    """

    rope: Mapping[str, object]
    positions: int
    tokens: Mapping[str, object]


def scalars_of(model: nn.Module) -> Scalars:
    """What the config of ``model`` says.

    Raises:
        ExportError: it has none, its attentions see a window only, or its heads are turned in part.
    """
    config: object = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(rope, Mapping) or not isinstance(positions, int):
        raise ExportError(
            "the model's config has no rope_parameters or no max_position_embeddings, and a graph does not tell how "
            "its rotary angles go on: give a model of Hugging Face with rotary attention"
        )
    if any(isinstance(each, Mapping) for each in rope.values()):
        raise ExportError("layers have rotary angles of different kinds, and a Llama has one")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ExportError("a part of each head is turned by rotary angles, and a Llama turns all of it")
    if window := _window(config, positions):
        raise ExportError(f"attentions see {window}, and a Llama's see all tokens before")
    given = {"rope_theta": rope.get("rope_theta"), "rope_parameters": dict(rope)}
    if (original := getattr(config, "original_max_position_embeddings", None)) is not None:
        given["original_max_position_embeddings"] = original
    kinds = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {kind: token for kind in kinds if (token := getattr(config, kind, None)) is not None}
    return Scalars(given, positions, tokens)


def _window(config: object, positions: int) -> str:
    """What keeps attentions from seeing all tokens before; "" if nothing does."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        other = next((kind for kind in kinds if kind != "full_attention"), None)
        return "" if other is None else f"no more than {other} lets them"
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return f"a window of {window} tokens" if isinstance(window, int) and used and window < positions else ""
