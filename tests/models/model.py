"""The models themselves: a front, layers with attributes such as ``layers.3.mlp``, a final norm and a head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import spec as s
from tests.models.bodies import make_body
from tests.models.edits import edited
from tests.models.norms import at_least_float32, make_norm

VOCABULARY = 11
MAX_LENGTH = 16


class ResidualLayer(nn.Module):
    """``attn``, ``attn_norm``, ``mlp``, ``mlp_norm``, ...: the sums of a layer, each in its own spelling."""

    def __init__(self, spec: s.Layer, width: int, cast: str) -> None:
        super().__init__()
        self.spec, self.cast = spec, cast
        for item in spec.sums:
            for i, branch in enumerate(item.branches):
                name = branch.attribute
                setattr(self, name, make_body(branch.body, width))
                if i == 0 or not item.shared_norm:
                    setattr(self, f"{name}_norm", make_norm(branch.norm, width))
                if branch.post_norm:
                    setattr(self, f"{name}_post_norm", make_norm(branch.norm, width))
                if branch.gain != "none":
                    setattr(self, f"{name}_gain", nn.Parameter(torch.ones(width if branch.gain == "channel" else ())))
                if branch.dropout == "module":
                    setattr(self, f"{name}_dropout", nn.Dropout(0.1))
            for name, factor in (
                (self.factor_name(item, "before"), item.before),
                (self.factor_name(item, "after"), item.after),
            ):
                if factor in ("scalar", "vector", "affine"):
                    setattr(self, name, nn.Parameter(torch.ones(() if factor == "scalar" else width)))
                if factor == "affine":
                    setattr(self, f"{name}_bias", nn.Parameter(torch.ones(width)))
                if factor == "buffer":
                    self.register_buffer(name, torch.full((1,), 0.7))

    def contribution(self, branch: s.Branch, x: Tensor, mask: Tensor) -> Tensor:
        """One branch from its normalised input: body, sandwich norm, learned gain, dropout, multiplier."""
        body = getattr(self, branch.attribute)
        if self.cast != "none":
            x = x.to(weight_dtype(body))
        f: Tensor = body(x, mask) if isinstance(branch.body, s.Attention) else body(x)
        if branch.post_norm:
            f = getattr(self, f"{branch.attribute}_post_norm")(f)
        if branch.gain != "none":
            f = getattr(self, f"{branch.attribute}_gain") * f
        match branch.dropout:
            case "module":
                f = getattr(self, f"{branch.attribute}_dropout")(f)
            case "functional":
                f = F.dropout(f, p=0.1, training=self.training)
            case "p=0":
                f = F.dropout(f, p=0.0)
        return edited(branch.edit, multiply(branch.scale_form, f, branch.scale))

    @staticmethod
    def factor_name(item: s.Sum, place: Literal["before", "after"]) -> str:
        return f"{item.branches[0].attribute}_{place}"

    def scaled(self, item: s.Sum, place: Literal["before", "after"], h: Tensor) -> Tensor:
        """The stream times what the model multiplies it with before or after a sum."""
        name = self.factor_name(item, place)
        match getattr(item, place):
            case "number":
                return 0.9 * h if place == "before" else h * 1.2
            case "quotient":
                return h / 1.5
            case "scalar" | "vector" | "buffer":
                return h * getattr(self, name)
            case "affine":
                return (h + getattr(self, f"{name}_bias")) * getattr(self, name)
        return h

    def forward(self, h: Tensor, mask: Tensor, keep_seen: bool) -> tuple[Tensor, list[Tensor]]:
        """The stream after the layer, and after each of its sums (copies, where a later sum would overwrite them)."""
        seen = []
        for item in self.spec.sums:
            terms = []
            x = h
            for i, branch in enumerate(item.branches):
                if i == 0 or not item.shared_norm:
                    x = getattr(self, f"{branch.attribute}_norm")(h)
                f = self.contribution(branch, x, mask)
                terms.append(f.to(h.dtype) if self.cast == "explicit" else f)
            h = self.scaled(item, "before", h)
            h = add_one(item, h, terms[0]) if len(terms) == 1 else add_several(item, h, terms, self.training)
            if item.after == "buffer" and item.form in s.IN_PLACE_FORMS:
                h *= getattr(self, self.factor_name(item, "after"))
            else:
                h = self.scaled(item, "after", h)
            seen.append(h.clone() if keep_seen else h)
        return h, seen


def weight_dtype(body: nn.Module) -> torch.dtype:
    """The dtype a branch computes in: that of its last matrix."""
    return [p for p in body.parameters() if p.ndim == 2][-1].dtype


def multiply(form: str, f: Tensor, scale: float | None) -> Tensor:
    if scale is None:
        return f
    match form:
        case "s*f":
            return scale * f
        case "f/q":
            return f / (1 / scale)
        case "torch.mul":
            return torch.mul(f, scale)
        case _:
            return f * scale


def add_one(item: s.Sum, h: Tensor, f: Tensor) -> Tensor:
    """``h + scale * f``, as people write it."""
    scale = 1.0 if item.scale is None else item.scale
    if item.form not in ("add_alpha", "add_alpha_", "h-f"):
        f = multiply("f*s", f, item.scale)
    match item.form:
        case "f+h":
            return f + h
        case "torch.add(h,f)":
            return torch.add(h, f)
        case "torch.add(f,h)":
            return torch.add(f, h)
        case "h.add(f)":
            return h.add(f)
        case "h-f":
            return h - f if scale == -1 else h - f * -scale
        case "add_alpha":
            return torch.add(h, f, alpha=scale)
        case "h+=f":
            h += f
            return h
        case "h.add_(f)":
            return h.add_(f)
        case "add_alpha_":
            return h.add_(f, alpha=scale)
        case _:
            return h + f


def add_several(item: s.Sum, h: Tensor, terms: list[Tensor], training: bool) -> Tensor:
    """A sum of the stream and several branches that all read it."""
    if item.form in ("terms+h", "h+terms", "h+dropout(terms)"):
        total = terms[0]
        for f in terms[1:]:
            total = total + f
        total = multiply("f*s", total, item.scale)
        if item.form == "h+dropout(terms)":
            return h + F.dropout(total, p=0.1, training=training)
        return total + h if item.form == "terms+h" else h + total
    for f in terms:
        f = multiply("f*s", f, item.scale)
        if item.form == "chain_inplace":
            h += f
        else:
            h = f + h if item.form == "chain_reversed" else h + f
    return h


class ResidualModel(nn.Module):
    def __init__(self, spec: s.Model) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        if spec.front == "projection":
            self.input_projection = nn.Linear(5, width)
        if spec.front.startswith("embedding"):
            self.tokens = nn.Embedding(VOCABULARY, width)
        if spec.front == "embedding+position":
            self.positions = nn.Embedding(MAX_LENGTH, width)
        self.layers = nn.ModuleList(ResidualLayer(layer, width, spec.cast) for layer in spec.layers)
        if spec.head != "none":
            self.norm = make_norm(s.Norm(), width)
        if spec.head == "norm+linear":
            self.head = nn.Linear(width, VOCABULARY, bias=False)

    def embed(self, x: Tensor) -> Tensor:
        """The start of the stream, in the stream's dtype."""
        match self.spec.front:
            case "scaled":
                h = x * 1.5
            case "projection":
                h = self.input_projection(x)
            case "embedding":
                h = self.tokens(x)
            case "embedding+position":
                h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
            case _:
                h = x
        return h if self.spec.cast == "none" else h.to(at_least_float32(h.dtype))

    def causal_mask(self, length: int, device: torch.device) -> Tensor:
        """Additive, with a bias on distance, made once and shared by every attention that masks by hand."""
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        return torch.where(distance >= 0, -0.1 * distance, float("-inf"))

    def finish(self, h: Tensor) -> Tensor:
        if self.spec.head != "none":
            h = self.norm(h)
        return self.head(h.to(self.head.weight.dtype)) if self.spec.head == "norm+linear" else h

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        h = self.embed(x)
        mask = self.causal_mask(x.shape[1], x.device)
        taps = [self.tap(h)]
        for layer in self.layers:
            h, seen = layer(h, mask, self.spec.in_place and self.spec.taps != "none")
            taps += [self.tap(t) for t in (seen if self.spec.taps == "sums" else [h])]
        out = self.finish(h)
        return out if self.spec.taps == "none" else (out, *taps)

    def tap(self, h: Tensor) -> Tensor:
        """A hidden state as a model returns it; an in-place sum would overwrite it, so such a model clones."""
        if self.spec.taps == "pooled":
            return h.mean(1)
        return h.clone() if self.spec.in_place and self.spec.taps != "none" else h


def build(spec: s.Model) -> ResidualModel:
    """The model in eval mode, with gains, biases and scales far enough from 1 and 0 that losing one shows."""
    generator = torch.Generator().manual_seed(spec.seed)
    model = ResidualModel(spec).eval().to(torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            else:
                p.copy_(1 + 0.3 * noise)
    model.to(spec.dtype)
    if spec.cast != "none":  # the usual mixed precision: the norms on the wide stream are wide
        for name, module in model.named_modules():
            if name.endswith("norm") and "inner" not in name and "post" not in name:
                module.to(at_least_float32(spec.dtype))
    return model


def make_input(spec: s.Model, number: int = 0) -> Tensor:
    """An input that the model takes; another one for each ``number``."""
    generator = torch.Generator().manual_seed(spec.seed + 1 + number)
    if spec.front.startswith("embedding"):
        return torch.randint(VOCABULARY, (spec.batch, spec.length), generator=generator)
    width = 5 if spec.front == "projection" else spec.width
    x = torch.randn(spec.batch, spec.length, width, generator=generator, dtype=torch.float64)
    if spec.front == "projection" or spec.cast == "none":
        return x.to(spec.dtype)
    return x.to(at_least_float32(spec.dtype))
