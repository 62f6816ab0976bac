"""Questions 4 and 1 of the paper (arXiv 2503.18908): is fusion easier with scale, and with experts? What models say.

    python benchmarks/scale_effect.py smollm2 ./other-model little-llama little-moe [--tokens 1024] [--json FILE]

Each model is given the same text. For every layer but the first: how far the FFN's contribution turns when the FFN
before it leaves (the paper's distance), what dropping its attention costs, and what it costs beyond that to let both
FFNs read one point, in KL to the model as it is; then what such a pair saves of a decode step, modelled for a GPU. All
of it by relative depth, in thirds, because models differ in their numbers of layers. KL is also given relative to what
dropping the FFN costs: a model that leans on its FFNs less loses less by anything.

Two sizes of two families say nothing of a law; three of one family would. "little-llama" and "little-moe" are trained
by the benchmark itself, for minutes, on the same kind of text: two models of one depth and width, with an FFN and with
four experts of which two are chosen beside a shared one. In a group each expert layer is routed by its own router, at
the point that both read, and the contributions add; their experts stay apart, so that a pair saves nothing here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from fxfuse import Plan, Recording
from fxfuse._common.files import write_atomically
from fxfuse._common.progress import bar
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import Loaded, load
from fxfuse.data.text import batches_of, docstrings, python_documentation
from fxfuse.measure.planned import Planned
from fxfuse.planning.modelled import model_costs

LITTLE = ("little-llama", "little-moe")

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Layer:
    """One layer and the one before it.

    Attributes:
        depth: of the layer, 0 to 1.
        distance: mean cosine distance by which its FFN's contribution turns when the FFN before leaves.
        attention: KL of dropping its attention.
        ffn: KL of dropping its FFN; of experts, the sum of those routed and those shared.
        pair: KL of its FFN and the one before as one wide FFN, beyond that of dropping the attention between.
    """

    depth: float
    distance: float
    attention: float
    ffn: float
    pair: float

    @property
    def third(self) -> str:
        return THIRDS[min(2, int(self.depth * 3))]


def little(name: str, steps: int, length: int) -> Loaded:
    """A model of twelve layers, 192 wide, trained on docstrings with SmolLM2's words."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    words = load("smollm2", torch.float32)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": words.model.get_input_embeddings().weight.shape[0],  # type: ignore[operator, union-attr]
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    if name == LITTLE[0]:
        model: Any = LlamaForCausalLM(LlamaConfig(intermediate_size=512, **sizes))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(shared_expert_intermediate_size=192, **experts, **sizes))
    made = Loaded(model, words.tokenizer, (), words.kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    text = list(batches_of(made, docstrings(), length, steps * 8 * length, batch=8))
    with bar("training", "steps", steps, True) as advance:
        for step in range(steps):
            ids: Any = text[step % len(text)]["input_ids"]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)
    print(f"{name}: trained on {steps * 8 * length:,} tokens, last loss {loss.item():.2f}")
    return made


def layers_of(loaded: Loaded, tokens: int, length: int) -> list[Layer]:
    """What each layer but the first says."""
    model = loaded.model.eval()
    batches = list(batches_of(loaded, python_documentation("record"), length, tokens, batch=2))
    recording = fxfuse.record(model, batches, max_group=0, progress=True)
    attentions = [b.name for b in recording.branches if b.kind == "attention"]
    blocks = _blocks(recording)
    if len(blocks) != len(attentions):
        raise SystemExit("this compares models whose layers are an attention and an FFN each")
    planned = Planned(model)

    def kl(plan: Plan) -> float:
        planned.plan = plan
        return float(fxfuse.evaluate(planned, batches, reference=model).kl or 0)

    found: list[Layer] = []
    with bar("pairs", "pairs", len(blocks) - 1, True) as advance:
        for number in range(1, len(blocks)):
            attention, pair = attentions[number], blocks[number - 1 : number + 1]
            alone = kl(Plan(drop=[attention]))
            together = kl(Plan(drop=[attention], parallel=[pair[0] + pair[1]]))
            found.append(_layer(recording, number / (len(blocks) - 1), pair, alone, together))
            advance(1)
    return found


def _blocks(recording: Recording) -> list[list[str]]:
    """The FFN of each layer; of experts, those that are routed and those that are shared."""
    made: list[list[str]] = []
    for branch in recording.branches:
        if branch.kind == "attention":
            made.append([])
        elif branch.kind in ("gated_ffn", "ffn", "moe") and made:
            made[-1].append(branch.name)
    return [block for block in made if block]


def _layer(
    recording: Recording, depth: float, pair: Sequence[Sequence[str]], attention: float, together: float
) -> Layer:
    first, second = ([recording.index(name) for name in block] for block in pair)
    distance = max(float(recording.mean[i, j]) for i in first for j in second)
    return Layer(depth, distance, attention, float(recording.kl[second].sum()), together - attention)


def summary(layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Medians by third of the depth."""
    columns: dict[str, Callable[[Layer], float]] = {
        "distance": lambda layer: layer.distance,
        "attention": lambda layer: layer.attention,
        "pair": lambda layer: layer.pair,
        "pair / ffn": lambda layer: layer.pair / layer.ffn,
    }
    return {
        third: {name: statistics.median(map(column, own)) for name, column in columns.items()}
        for third in THIRDS
        if (own := [layer for layer in layers if layer.third == third])
    }


def saved(model: nn.Module, layers: int, device: str, context: int) -> float:
    """Share of a decode step that one pair saves beyond the drop between, modelled."""
    costs = model_costs(model, device, context=context)
    ffns = [branch.name for branch in costs.branches if len(branch.groups) > 1]
    if len(costs.branches) != 2 * len(ffns):
        return 0.0  # experts stay apart
    return costs.gain(Plan(parallel=[ffns[layers // 2 : layers // 2 + 2]])).seconds / costs.whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help=f"as the commands of fxfuse take them, or {' or '.join(LITTLE)}")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--device", default="h100", help="the GPU whose times are modelled")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(Machine.here())
    print(
        "| model | parameters | depth | distance | KL of the attention | KL of the pair | pair / FFN | a pair saves |"
    )
    print("|---" * 8 + "|")
    for name in arguments.models:
        made = name in LITTLE
        loaded = little(name, arguments.steps, arguments.length) if made else load(name, torch.float32)
        layers = layers_of(loaded, arguments.tokens, arguments.length)
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        share, thirds = saved(loaded.model, len(layers), arguments.device, arguments.context), summary(layers)
        for third, each in thirds.items():
            numbers = " | ".join(f"{number:.4g}" for number in each.values())
            print(f"| {name} | {parameters / 1e6:.0f}M | {third} | {numbers} | {share:.2%} |", flush=True)
        rows.append({"model": name, "parameters": parameters, "saved": share, "thirds": thirds})
        rows[-1]["layers"] = [asdict(layer) for layer in layers]
        if arguments.json:
            found = {"machine": str(Machine.here()), "tokens": arguments.tokens, "models": rows}
            write_atomically(arguments.json, (json.dumps(found, indent=2) + "\n").encode())
    if len(rows) < 3:
        print("Fewer than three sizes of one family, trained alike, show no effect of scale.")


if __name__ == "__main__":
    main()
