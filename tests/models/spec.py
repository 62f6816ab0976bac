"""What a test model is, as frozen data: hypothesis draws it, prints it and shrinks it.

A model is a residual stream and a list of *sums*. Each sum adds one or more branches that all read the stream as it
was before the sum; a layer is a handful of sums. Everything that has several spellings in real code (norms, gates,
the order of a sum's operands, multipliers, casts) is a field here, so that a failing example reads like a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from tests.models.edits import Edit, Place

Twist = Literal["none", "self_gate", "two_inputs", "token_gate", "clamp", "transposed", "softmax"]
Kind = Literal["attention", "gated", "plain", "other"]
NormKind = Literal[
    "rms_hf", "rms_functional", "rms_module", "rms_rsqrt", "rms_sqrt", "rms_gain_plus_one", "rms_gain_after_cast",
    "rms_parameterless", "layer_norm", "layer_norm_no_bias", "layer_norm_parameterless", "none",
]  # fmt: skip
Layout = Literal[
    "separate", "gate_up_chunk", "up_gate_chunk", "gate_up_split", "gate_up_slice", "interleaved", "overlap"
]
Activation = Literal["silu", "silu_module", "silu_sigmoid", "silu_exp", "gelu", "gelu_tanh", "relu", "quick_gelu"]
SumForm = Literal[
    # one branch
    "h+f", "f+h", "torch.add(h,f)", "torch.add(f,h)", "h.add(f)", "h-f", "add_alpha", "h+=f", "h.add_(f)", "add_alpha_",
    # several branches
    "terms+h", "h+terms", "chain", "chain_reversed", "chain_inplace", "h+dropout(terms)",
]  # fmt: skip
ONE_BRANCH_FORMS: tuple[SumForm, ...] = (
    "h+f", "f+h", "torch.add(h,f)", "torch.add(f,h)", "h.add(f)", "h-f", "add_alpha", "h+=f", "h.add_(f)", "add_alpha_",
)  # fmt: skip
SEVERAL_BRANCH_FORMS: tuple[SumForm, ...] = (
    "terms+h", "h+terms", "chain", "chain_reversed", "chain_inplace", "h+dropout(terms)",
)  # fmt: skip
Factor = Literal["none", "number", "quotient", "scalar", "buffer", "vector", "affine"]
IN_PLACE_FORMS: frozenset[SumForm] = frozenset({"h+=f", "h.add_(f)", "add_alpha_", "chain_inplace"})


class Spec:
    """Prints only what is not a default, so that a minimal example is short and can be pasted into a test."""

    def __repr__(self) -> str:
        said = [f for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in said)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Norm(Spec):
    kind: NormKind = "rms_hf"
    eps: float = 1e-5


@dataclass(frozen=True, repr=False)
class FFN(Spec):
    """A feed-forward body: gated (two projections and a product) or plain (one projection and an activation)."""

    hidden: int = 8
    gated: bool = True
    layout: Layout = "separate"
    activation: Activation = "silu"
    up_first: bool = False  # the product is written up * act(gate)
    bias: tuple[bool, bool, bool] = (False, False, False)  # gate (or packed), up, down
    gate_scale: float | None = None  # act(gate * gate_scale)
    inner_norm: bool = False  # a norm over the hidden units: cannot be widened
    flat: bool = False  # view(-1, d) around the body
    twist: Twist = "none"  # what makes a SwiGLU something else, or only look so
    edit: tuple[Place, Edit] | None = None  # a value inside it is edited in place


@dataclass(frozen=True, repr=False)
class Attention(Spec):
    heads: int = 1
    kv_heads: int = 1
    packed: bool = False  # one qkv projection
    by_hand: bool = False  # softmax(q @ k.T + mask) @ v with a mask made once for all layers
    bias: bool = False


@dataclass(frozen=True, repr=False)
class Mixer(Spec):
    """A token mixer that is neither attention nor an FFN."""

    kind: Literal["conv", "shift", "cumulative"] = "conv"


Body = FFN | Attention | Mixer


@dataclass(frozen=True, repr=False)
class Branch(Spec):
    attribute: str
    body: Body
    norm: Norm = Norm()
    scale: float | None = None
    scale_form: Literal["f*s", "s*f", "f/q", "torch.mul"] = "f*s"
    dropout: Literal["none", "module", "functional", "p=0"] = "none"
    post_norm: bool = False  # sandwich: a norm on what the branch contributes
    gain: Literal["none", "channel", "scalar"] = "none"  # a learned multiplier on what it contributes
    edit: Edit | None = None  # what it contributes is edited in place

    @property
    def kind(self) -> Kind:
        if isinstance(self.body, FFN):
            return "gated" if self.body.gated else "plain"
        return "attention" if isinstance(self.body, Attention) else "other"


@dataclass(frozen=True, repr=False)
class Sum(Spec):
    branches: tuple[Branch, ...]
    form: SumForm = "h+f"
    scale: float | None = None  # on all the branches of the sum
    shared_norm: bool = False  # the branches read one norm, the first one's
    before: Factor = "none"  # a * h + f(h): what the sum takes the stream times
    after: Factor = "none"  # c * (h + f(h)): what its result is multiplied with


@dataclass(frozen=True, repr=False)
class Layer(Spec):
    sums: tuple[Sum, ...]


@dataclass(frozen=True)
class BranchName:
    """Where a branch stands: ``name`` is its module path, ``sum`` counts sums from the start of the stream."""

    name: str
    kind: Kind
    layer: int
    sum: int


@dataclass(frozen=True, repr=False)
class Model(Spec):
    width: int
    layers: tuple[Layer, ...]
    batch: int = 1
    length: int = 2
    dtype: torch.dtype = torch.float64
    cast: Literal["none", "explicit", "implicit"] = "none"  # a stream kept wider than the branches
    front: Literal["float", "scaled", "projection", "embedding", "embedding+position"] = "float"
    taps: Literal["none", "layers", "sums", "pooled"] = "none"
    head: Literal["none", "norm", "norm+linear"] = "norm+linear"
    seed: int = 0

    @property
    def branches(self) -> tuple[BranchName, ...]:
        """Every branch in stream order."""
        return tuple(
            BranchName(f"layers.{i}.{branch.attribute}", branch.kind, i, k)
            for i, k, item in self.sums()
            for branch in item.branches
        )

    @property
    def in_place(self) -> bool:
        return any(item.form in IN_PLACE_FORMS for _, _, item in self.sums())

    def sums(self) -> Iterator[tuple[int, int, Sum]]:
        """(layer, position in the stream, sum), in stream order."""
        k = 0
        for i, layer in enumerate(self.layers):
            for item in layer.sums:
                yield i, k, item
                k += 1
