from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse import Plan
from fxfuse.errors import CaptureError, HealError
from fxfuse.healing.fit import fit_step
from fxfuse.healing.pair import Pair, pairs
from fxfuse.healing.steps import Outcome, Sample, front_to_back
from tests.models.tiny import Tower, llama, planned, tokens, vectors


def batches(count: int = 6, length: int = 24) -> list[dict[str, object]]:
    return [{"input_ids": tokens(2, length, seed), "use_cache": False} for seed in range(count)]


def samples(made: list[Pair]) -> list[Sample]:
    """The last two of them held out, as text of two kinds."""
    last = len(made) - 2
    return [Sample(pair, f"kind {n % 2}", n >= last) for n, pair in enumerate(made)]


def fitted(model: nn.Module, plan: Plan, text: list[dict[str, object]], block: int = 4096) -> tuple[Any, list[Outcome]]:
    said: list[Outcome] = []
    improve = partial(fit_step, block=block)
    weights = front_to_back(samples(pairs(model, plan, text)), improve, keep=lambda _, each: said.append(each))
    return weights, said


class Seen:
    """What a Hugging Face Llama computes at each residual sum: the inputs of its output maps, the stream after it."""

    def __init__(self, model: Any, text: list[dict[str, object]]) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.streams: dict[str, list[Tensor]] = {}
        layers = [getattr(layer, "layer", layer) for layer in model.model.layers]
        hooks = []
        for n, layer in enumerate(layers):
            after = layers[n + 1].input_layernorm if n + 1 < len(layers) else model.model.norm
            for name, last, norm in (
                (f"model.layers.{n}.self_attn", layer.self_attn.o_proj, layer.post_attention_layernorm),
                (f"model.layers.{n}.mlp", layer.mlp.down_proj, after),
            ):
                hooks.append(last.register_forward_pre_hook(self._keep(self.inputs, name)))
                hooks.append(norm.register_forward_pre_hook(self._keep(self.streams, name)))
        with torch.no_grad():
            for batch in text:
                model(**batch)
        for hook in hooks:
            hook.remove()

    @staticmethod
    def _keep(into: dict[str, list[Tensor]], name: str) -> Any:
        return lambda module, args: into.setdefault(name, []).append(args[0].flatten(0, 1).clone())


def by_hand(teacher: Any, drop: list[str], text: list[dict[str, object]], strengths: dict[str, float]) -> Any:
    """The same fit with the model's own modules, one whole forward pass a map."""
    student = planned(teacher, drop)
    goal = Seen(teacher, text).streams
    for name, strength in strengths.items():
        layer = student.model.layers[int(name.split(".")[2])].layer
        last = layer.self_attn.o_proj if name.endswith("attn") else layer.mlp.down_proj
        seen = Seen(student, text)
        u, r, t = seen.inputs[name], seen.streams[name], goal[name]
        n = len(text) - 2
        inputs, wanted = torch.cat(u[:n]), torch.cat(t[:n])
        weight = 1 / wanted.norm(dim=-1, keepdim=True)
        rows, residual = inputs * weight, (wanted - torch.cat(r[:n])) * weight
        ridge = (strength * rows.square().sum(0).mean()).sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)
        change = torch.linalg.lstsq(
            torch.cat([rows, ridge]), torch.cat([residual, torch.zeros_like(wanted)[: len(ridge)]])
        )
        with torch.no_grad():
            last.weight += change.solution.T
    return student


def test_it_is_ridge_regression_from_front_to_back() -> None:
    model, text = llama(4), batches()
    drop = ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    weights, said = fitted(model, Plan(drop=drop), text)
    strengths = {each.branches[0]: each.strength for each in said if each.strength}
    student = by_hand(model, drop, text, strengths)

    assert next(iter(strengths)) == "model.layers.1.mlp" and len(strengths) >= 3
    own = dict(student.named_parameters())
    for name, new in weights.items():
        torch.testing.assert_close(
            new, own[name.replace(".self_attn", ".layer.self_attn").replace(".mlp", ".layer.mlp")]
        )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_nothing_before_the_first_edit_is_fitted() -> None:
    _, said = fitted(llama(4), Plan(drop=["model.layers.2.self_attn"]), batches())

    names = [each.branches[0] for each in said]
    assert names == ["model.layers.2.mlp", "model.layers.3.self_attn", "model.layers.3.mlp"]


def test_batches_may_be_cut_otherwise() -> None:
    plan = Plan(drop=["model.layers.1.self_attn"])
    text = batches()
    rows = [{**batch, "input_ids": row[None]} for batch in text for row in batch["input_ids"]]
    one, _ = fitted(llama(3), plan, text)
    made = pairs(llama(3), plan, rows)
    cut = [Sample(pair, f"kind {n // 2 % 2}", n >= 8) for n, pair in enumerate(made)]
    other = front_to_back(cut, partial(fit_step, block=4096))

    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)


class Planted(nn.Module):
    """A layer whose second branch is a linear map of its FFN's hidden units, which read the same point."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.side = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        side = self.side[1](torch.relu(self.side[0](normed)))
        return x + self.down(torch.relu(self.up(normed))) + side


def test_a_planted_student_is_recovered() -> None:
    torch.manual_seed(0)
    model = Planted()
    model.side[0].load_state_dict(model.up.state_dict())  # type: ignore[arg-type]
    text = [{"x": vectors(4, 10, 8, seed=seed)} for seed in range(6)]

    weights, _ = fitted(model, Plan(drop=["side"]), text)

    wanted = {
        "down.weight": model.down.weight + model.side[1].weight,
        "down.bias": model.down.bias + model.side[1].bias,
    }
    assert weights.keys() == wanted.keys()
    for name, new in weights.items():
        torch.testing.assert_close(new, wanted[name], rtol=0, atol=1e-8)


class SelfAttention(nn.Module):
    """Over one token it is a linear map: ``o(v(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=last) for last in (False, False, False, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn_norm, self.attn = nn.LayerNorm(8), SelfAttention()
        self.ffn_norm, self.ffn = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.ffn(self.ffn_norm(x))


def test_a_linear_map_in_an_attentions_place_is_fitted_from_nothing() -> None:
    model = Attending()
    text = [{"x": vectors(40, 1, 8, seed=seed)} for seed in range(6)]

    weights, said = fitted(model, Plan(linear=["attn"]), text)

    assert said[0].branches == ("attn",) and said[0].after < 1e-12
    normed = model.attn_norm(vectors(9, 1, 8, seed=99))
    made = nn.functional.linear(normed, weights["attn.o.weight"], weights["attn.o.bias"])
    torch.testing.assert_close(made, model.attn(normed), rtol=0, atol=1e-7)


def test_a_plan_that_changes_nothing_changes_nothing() -> None:
    model = llama(3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()

    weights, _ = fitted(model, Plan(drop=["model.layers.1.self_attn"]), batches())

    for name, new in weights.items():
        torch.testing.assert_close(new, model.get_parameter(name), rtol=0, atol=1e-8)


@pytest.mark.parametrize("block", [7, 40, 4096])
def test_blocks_lessen_the_error_too(block: int) -> None:
    plan = Plan(drop=["model.layers.1.self_attn"], parallel=[["model.layers.0.mlp", "model.layers.1.mlp"]])
    _, said = fitted(llama(3), plan, batches(12), block)

    assert said[0].branches == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert said[0].after < 0.9 * said[0].before


def test_what_comes_later_in_the_plan_is_no_part_of_the_goal() -> None:
    """Of a group that reads before a branch that stays, the goal is the original's stream without that branch."""
    tower = Tower(3)
    x = vectors(2, 5, 8)
    (pair,) = pairs(tower, Plan(parallel=[["layers.0.mlp", "layers.2.mlp"]]), [{"x": x}])

    pair.reach()
    goal = pair.goal()
    with torch.no_grad():
        first = tower.layers[0](x)
        second = tower.layers[1](first)
        wanted = tower.layers[2](second) - tower.layers[1].mlp(tower.layers[1].norm(first))  # type: ignore[operator]

    torch.testing.assert_close(goal, wanted.flatten(0, 1))


def test_masked_positions_do_not_count() -> None:
    plan = Plan(drop=["model.layers.1.self_attn"])
    text = batches(8)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[:, 20:] = 0
    other = [{**batch, "attention_mask": mask} for batch in text]
    noisy = [{**batch, "input_ids": torch.where(mask.bool(), batch["input_ids"], 7)} for batch in other]
    one, first = fitted(llama(3), plan, other)
    two, _ = fitted(llama(3), plan, noisy)

    assert first[0].tokens == (6 * 40, 2 * 40)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_too_few_tokens_say_how_many_it_takes() -> None:
    with pytest.raises(HealError, match="20 tokens to fit to .* 32 channels"):
        fitted(llama(3), Plan(drop=["model.layers.1.self_attn"]), batches(4, 5))


class Scaled(Tower):
    """Its stream runs through an autocast region."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_an_autocast_region_around_the_stream_is_refused() -> None:
    with pytest.raises(CaptureError, match="autocast"):
        pairs(Scaled(3), Plan(drop=["layers.1.mlp"]), [{"x": vectors()}])
