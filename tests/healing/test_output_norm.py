"""Fits of branches whose output is normed before the stream gets it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from fxfuse.healing.output_norm import OutputNorm
from fxfuse.healing.pair import pairs
from tests.healing.test_fit import fit_step, front_to_back, samples
from tests.healing.test_own_maps import gemma3
from tests.models.tiny import tokens, vectors

WIDTH = 8


class PlusOne(nn.Module):
    """Gemma's RMS norm: its gain is a parameter and one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + self.weight)


class Called(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-5)
        nn.init.normal_(self.weight)  # of either sign


class FFN(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Sandwich(nn.Module):
    """Two FFNs with norms before and after them; the second one is double the size on its way to the stream."""

    def __init__(self, norm: type[nn.Module], bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.ffn0, self.ffn1, self.ffn2 = (FFN(bias) for _ in range(3))
        self.after0, self.after1, self.after2 = (norm() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after0(self.ffn0(self.norm0(x)))
        x = x + 2.0 * self.after1(self.ffn1(self.norm1(x)))
        return x + self.after2(self.ffn2(self.norm2(x)))


def silenced(model: Sandwich) -> Sandwich:
    """The model whose first FFN adds nothing, so that dropping it changes nothing."""
    with torch.no_grad():
        for parameter in model.ffn0.down.parameters():
            parameter.zero_()
    return model


def text(length: int = 60) -> list[dict[str, object]]:
    return [{"x": vectors(2, length, WIDTH, seed=seed)} for seed in range(6)]


def errors(found: list[Any]) -> dict[str, tuple[float, float]]:
    return {outcome.branches[0]: (outcome.before, outcome.after) for outcome in found}


def fitted(model: nn.Module, plan: Plan, healed: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Any]:
    said: list[Any] = []
    made = pairs(model, plan, text(), healed)
    weights = front_to_back(samples(made), lambda each: fit_step(each, 4096), keep=lambda _, each: said.append(each))
    return weights, errors(said)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [PlusOne, Called])
def test_a_planted_student_is_nearly_recovered(norm: type[nn.Module], bias: bool) -> None:
    model = silenced(Sandwich(norm, bias))
    generator = torch.Generator().manual_seed(5)
    planted = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in model.state_dict().items()
        if name.startswith(("ffn1.down", "after1"))
    }

    weights, found = fitted(model, Plan(drop=["ffn0"]), planted)

    before, after = found["ffn1"]
    assert before > 0.01 and after < before / 30
    assert {"ffn1.down.weight", "after1.weight"} <= weights.keys()


@pytest.mark.parametrize("norm", [PlusOne, Called])
def test_the_stream_comes_nearer_to_the_original(norm: type[nn.Module]) -> None:
    """Told by the model itself: what it gives with the weights that the fit returns."""
    model = Sandwich(norm, bias=True)
    student = silenced(copy.deepcopy(model))
    held = text()[-2:]

    def missing() -> float:
        parts = [
            (student(**batch) - model(**batch)).square().sum(-1) / model(**batch).square().sum(-1) for batch in held
        ]
        return float(torch.cat([part.flatten() for part in parts]).mean())

    with torch.no_grad():
        before = missing()
        weights, found = fitted(model, Plan(drop=["ffn0"]))
        student.load_state_dict({**student.state_dict(), **weights})
        after = missing()

    assert after < 0.8 * before
    assert after == pytest.approx(found["ffn2"][1], rel=1e-6)
    assert all(later <= earlier for earlier, later in found.values())


def test_rows_take_the_direction_and_the_gain_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, change = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    gain = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    rows[3] = 0  # no direction
    change[4] = 0  # and none that is wanted
    norm = OutputNorm(gain=None, offset=0.25, eps=0.0)  # type: ignore[arg-type]  # of no graph

    made, new = norm.changed(rows, gain - 0.25, change)

    torch.testing.assert_close(made.norm(dim=1), rows.norm(dim=1))
    wanted = gain[:, None] * rows + change
    wanted[3], new[3] = 0, 0
    torch.testing.assert_close((new + 0.25)[:, None] * made, wanted)
    assert new[1] + 0.25 < 0


def test_gemma_is_fitted_after_a_drop() -> None:
    model = gemma3(torch.float32)
    batches = [{"input_ids": tokens(2, 48, seed), "use_cache": False} for seed in range(6)]
    plan = Plan(drop=["model.layers.1.self_attn"])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    healing = fxfuse.heal(model, plan, {"one": batches[:3], "other": batches[3:]}, "fit")

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.layers.1.mlp.down_proj.weight", "model.layers.1.post_feedforward_layernorm.weight"} <= changed
    assert all(outcome.after <= outcome.before for outcome in healing.outcomes)
