"""The bodies of branches: feed-forwards, attention and other token mixers, spelled the ways people spell them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.edits import Edit, EditingHook, Place, edited
from tests.models.spec import FFN, Activation, Attention, Body, Mixer


def activate(kind: Activation, x: Tensor) -> Tensor:
    match kind:
        case "silu":
            return F.silu(x)
        case "silu_sigmoid":
            return x * torch.sigmoid(x)
        case "silu_exp":
            return x / (1 + torch.exp(-x))
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return torch.relu(x)
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "silu_module":
            raise AssertionError("the module holds this one")


class TransposedLinear(nn.Module):
    """GPT-2's Conv1D: ``x @ weight + bias`` with the weight as [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int = 12, bias: bool = False, up_first: bool = False, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        self.up_first = up_first

    def forward(self, x: Tensor) -> Tensor:
        if self.up_first:
            return self.down(self.up(x) * F.silu(self.gate(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FFNBody(nn.Module):
    """Gated or plain, packed or not; the fields of the spec decide the spelling, never the mathematics of a name."""

    def __init__(self, spec: FFN, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        gate_bias, up_bias, down_bias = spec.bias
        if not spec.gated:
            self.up = nn.Linear(width, spec.hidden, bias=up_bias)
        elif spec.layout == "separate":
            self.gate = nn.Linear(width, spec.hidden, bias=gate_bias)
            self.up = nn.Linear(width, spec.hidden, bias=up_bias)
        else:
            rows = spec.hidden + 1 if spec.layout == "overlap" else 2 * spec.hidden
            self.gate_up = nn.Linear(width, rows, bias=gate_bias)
        if spec.activation == "silu_module":
            self.act = nn.SiLU()
        if spec.inner_norm:
            self.inner_norm = nn.RMSNorm(spec.hidden, eps=1e-5)
        if spec.twist == "transposed":
            self.down = TransposedLinear(spec.hidden, width)
        else:
            self.down = nn.Linear(spec.hidden, width, bias=down_bias)
        if spec.twist == "token_gate":
            self.router = nn.Linear(width, 1)
        if spec.twist == "two_inputs":
            self.up_norm = nn.LayerNorm(width)
        if spec.edit is not None and spec.edit[0] == "hook":
            self.down.register_forward_hook(EditingHook(spec.edit[1]))

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.layout == "separate":
            gate = self.gate(x)
            if self.spec.twist == "self_gate":
                return gate, gate * self.up(x)
            return gate, self.up(self.up_norm(x) if self.spec.twist == "two_inputs" else x)
        packed, f = self.gate_up(x), self.spec.hidden
        match self.spec.layout:
            case "gate_up_chunk":
                gate, up = packed.chunk(2, dim=-1)
            case "up_gate_chunk":
                up, gate = torch.chunk(packed, 2, -1)
            case "gate_up_split":
                gate, up = packed.split(f, dim=-1)
            case "gate_up_slice":
                gate, up = packed[..., :f], packed[..., f:]
            case "interleaved":
                gate, up = packed[..., ::2], packed[..., 1::2]
            case _:  # overlap: looks like a packed pair and is none
                gate, up = packed[..., :f], packed[..., 1:]
        return gate, up

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.spec.flat:
            x = x.view(-1, self.width)
        x = edited(self.edit_of("input"), x)
        if self.spec.gated:
            gate, up = self.gate_and_up(x)
            gate, up = edited(self.edit_of("gate"), gate), edited(self.edit_of("up"), up)
            if self.spec.gate_scale is not None:
                gate = gate * self.spec.gate_scale
            gate = self.activate(gate)
            hidden = up * gate if self.spec.up_first else gate * up
        else:
            hidden = self.activate(edited(self.edit_of("up"), self.up(x)))
        if self.spec.twist == "clamp":
            hidden = hidden.clamp(max=0.5)
        if self.spec.twist == "softmax":
            hidden = hidden.softmax(-1)
        if self.spec.inner_norm:
            hidden = self.inner_norm(hidden)
        out = edited(self.edit_of("output"), self.down(edited(self.edit_of("hidden"), hidden)))
        if self.spec.twist == "token_gate":
            out = out * torch.sigmoid(self.router(x))
        return out.view(shape) if self.spec.flat else out

    def edit_of(self, place: Place) -> Edit | None:
        return self.spec.edit[1] if self.spec.edit is not None and self.spec.edit[0] == place else None

    def activate(self, x: Tensor) -> Tensor:
        return self.act(x) if self.spec.activation == "silu_module" else activate(self.spec.activation, x)


class AttentionBody(nn.Module):
    """Causal self-attention: grouped heads, one packed projection or three, SDPA or softmax by hand."""

    def __init__(self, spec: Attention, width: int) -> None:
        super().__init__()
        self.spec, self.head_dim = spec, width // spec.heads
        kv = spec.kv_heads * self.head_dim
        if spec.packed:
            self.qkv = nn.Linear(width, width + 2 * kv, bias=spec.bias)
        else:
            self.q = nn.Linear(width, width, bias=spec.bias)
            self.k = nn.Linear(width, kv, bias=spec.bias)
            self.v = nn.Linear(width, kv, bias=spec.bias)
        self.o = nn.Linear(width, width, bias=spec.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        kv = self.spec.kv_heads * self.head_dim
        if self.spec.packed:
            q, k, v = self.qkv(x).split([width, kv, kv], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.view(batch, length, self.spec.heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, length, self.spec.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, length, self.spec.kv_heads, self.head_dim).transpose(1, 2)
        if self.spec.by_hand:
            repeats = self.spec.heads // self.spec.kv_heads
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask.to(x.dtype)
            attended = torch.softmax(scores, dim=-1) @ v
        else:
            grouped = self.spec.heads != self.spec.kv_heads
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o(attended.transpose(1, 2).reshape(batch, length, width))


class MixerBody(nn.Module):
    """Mixes tokens without attention: a causal depthwise convolution, a token shift, a running mean."""

    def __init__(self, spec: Mixer, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.inp = nn.Linear(width, width)
        if spec.kind == "conv":
            self.conv = nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.mix = nn.Parameter(torch.rand(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x = self.inp(x)
        if self.spec.kind == "conv":
            mixed = self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2)
        elif self.spec.kind == "shift":
            mixed = F.pad(x, (0, 0, 1, -1))
        else:
            mixed = x.cumsum(1) / torch.arange(1, length + 1, device=x.device, dtype=x.dtype)[:, None]
        return self.out(x * self.mix + mixed * (1 - self.mix))


def make_body(spec: Body, width: int) -> nn.Module:
    match spec:
        case FFN():
            return FFNBody(spec, width)
        case Attention():
            return AttentionBody(spec, width)
        case Mixer():
            return MixerBody(spec, width)
