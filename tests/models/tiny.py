"""Small models with random weights, and what a plan means for them, told by their own modules. Never imports fxfuse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tests.models.bodies import SwiGLU

Member = str | Sequence[str]
Parallel = Sequence[Sequence[Member]]


def redraw(model: nn.Module, seed: int = 0, spread: float = 0.3) -> None:
    """Give every parameter random values, so that no gain is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(spread * values)


def llama(layers: int = 4, dtype: torch.dtype = torch.float64, **config: Any) -> LlamaForCausalLM:
    """A Llama of width 32 with 50 tokens; two key-value heads for four queries."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 50}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "max_position_embeddings": 512}
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | ids | config))).to(dtype).eval()
    redraw(model)
    return model


def gemma3(layers: int = 5, window: int = 6, dtype: torch.dtype = torch.float64) -> Gemma3ForCausalLM:
    """A Gemma 3 whose layers 0, 1, 3, 4, ... attend to a window, and 2, 5, ... to everything."""
    kinds = ["full_attention" if index % 3 == 2 else "sliding_attention" for index in range(layers)]
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": 50, "max_position_embeddings": 512}
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = Gemma3TextConfig(**sizes, **ids, sliding_window=window, layer_types=kinds)
    model = Gemma3ForCausalLM(config).to(dtype).eval()
    redraw(model)
    return model


def tokens(batch: int = 1, length: int = 7, seed: int = 1, vocabulary: int = 50) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


class _Waiting(nn.Module):
    """A decoder layer that hands the stream on as it came; the last one runs them all, as the plan says."""

    def __init__(self, layer: nn.Module, run: Callable[[Tensor, list[dict[str, Any]]], Tensor], last: bool) -> None:
        super().__init__()
        self.layer, self.last = layer, last
        self._run = run

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self._run(hidden_states, self.last, kwargs)


class _Stream:
    """The decoder layers of a Llama, a Gemma 3, an OLMo 2 or a Granite under a plan, one branch at a time."""

    def __init__(self, layers: Sequence[nn.Module], drop: Collection[str], parallel: Parallel) -> None:
        self.layers, self.drop = list(layers), set(drop)
        self.order = [(index, part) for index in range(len(layers)) for part in ("self_attn", "mlp")]
        self.groups = [
            [[self._key(name) for name in ([member] if isinstance(member, str) else member)] for member in group]
            for group in parallel
        ]
        self.gone = {self._key(name) for name in drop}
        self.moved = {key for group in self.groups for member in group for key in member}
        assert self.gone | self.moved <= set(self.order)
        assert not self.gone & self.moved
        self.waiting: list[dict[str, Any]] = []

    @staticmethod
    def _key(name: str) -> tuple[int, str]:
        index, part = name.removeprefix("model.layers.").split(".")
        return int(index), part

    def __call__(self, h: Tensor, last: bool, kwargs: dict[str, Any]) -> Tensor:
        self.waiting.append(kwargs)
        if not last:
            return h
        calls, self.waiting = self.waiting, []
        for key in self.order:
            for group in self.groups:
                if min(key for member in group for key in member) == key:
                    added = [f for member in group for f in self._sequence(member, h, calls)]
                    h = h + sum(added)
            if key in self.moved:
                continue
            f = self._branch(key, h, calls)  # a dropped attention is called too: its cache counts the tokens
            if key not in self.gone:
                h = h + f
        return h

    def _sequence(self, member: list[tuple[int, str]], h: Tensor, calls: list[dict[str, Any]]) -> list[Tensor]:
        added: list[Tensor] = []
        for key in member:
            added.append(self._branch(key, h + sum(added), calls))
        return added

    def _branch(self, key: tuple[int, str], h: Tensor, calls: list[dict[str, Any]]) -> Tensor:
        layer: Any = self.layers[key[0]]
        as_it_is = nn.Identity()
        normed_after = hasattr(layer, "post_feedforward_layernorm")  # Gemma 3; OLMo 2, which has no norm before
        if key[1] == "self_attn":
            f = layer.self_attn(getattr(layer, "input_layernorm", as_it_is)(h), **calls[key[0]])[0]
            f = layer.post_attention_layernorm(f) if normed_after else f
        elif normed_after:
            f = layer.post_feedforward_layernorm(layer.mlp(getattr(layer, "pre_feedforward_layernorm", as_it_is)(h)))
        else:
            f = layer.mlp(layer.post_attention_layernorm(h))
        return f * getattr(layer, "residual_multiplier", 1.0)


def planned(model: Any, drop: Collection[str] = (), parallel: Parallel = ()) -> Any:
    """A copy of a Hugging Face model that computes what the plan says, with the model's own modules."""
    made = copy.deepcopy(model)
    layers = list(made.model.layers)
    run = _Stream(layers, drop, parallel)
    made.model.layers = nn.ModuleList(
        _Waiting(layer, run, index == len(layers) - 1) for index, layer in enumerate(layers)
    )
    return made


def silenced(model: Any, plan: Any) -> Any:
    """As :func:`planned`, and of each narrowed FFN the down projection reads zeros for the units it does not keep."""
    made = copy.deepcopy(model)
    for name, units in plan.narrow.items():
        made.get_submodule(f"{name}.down_proj").register_forward_pre_hook(partial(_masked, units))
    return planned(made, plan.drop, plan.parallel)


def _masked(units: tuple[int, ...], _: nn.Module, args: tuple[Tensor]) -> Tensor:
    made = torch.zeros_like(args[0])
    made[..., list(units)] = args[0][..., list(units)]
    return made


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = SwiGLU(hidden, bias, width=width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h))


class Tower(nn.Module):
    """A stream with nothing but FFNs, float64: gains, shifts and biases everywhere, and cheap to trace."""

    def __init__(self, layers: int = 2, width: int = 8, hidden: int = 12, bias: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, hidden, bias) for _ in range(layers))
        self.double().eval()
        redraw(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def parallel(self, x: Tensor) -> Tensor:
        """What the model computes when all its FFNs are one group."""
        return x + sum(layer.mlp(layer.norm(x)) for layer in self.layers)  # type: ignore[operator, return-value]

    @property
    def mlps(self) -> list[str]:
        """The branches' names."""
        return [f"layers.{index}.mlp" for index in range(len(self.layers))]


def vectors(*sizes: int, seed: int = 1) -> Tensor:
    return torch.randn(*(sizes or (2, 3, 8)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counter:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def __len__(self) -> int:
        return len(self.graphs)
