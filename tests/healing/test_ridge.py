from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.errors import NotFiniteError
from fxfuse.healing.ridge import STRENGTHS, Sums, best_strength, shares, solve


def drawn(tokens: int = 200, units: int = 7, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    make = torch.randn
    return (
        make(tokens, units, dtype=torch.float64),
        make(tokens, width, dtype=torch.float64),
        torch.rand(tokens, dtype=torch.float64),
    )


def summed(inputs: Tensor, residual: Tensor, weight: Tensor) -> Sums:
    sums = Sums.empty(inputs.shape[1], residual.shape[1], inputs.device)
    sums.add(inputs, residual, weight)
    return sums


@pytest.mark.parametrize("strength", [1e-10, 0.01, 1.0])
def test_the_change_is_the_minimum(strength: float) -> None:
    inputs, residual, weight = drawn()
    change = solve(summed(inputs, residual, weight), strength)
    assert change is not None
    ridge = strength * (weight[:, None] * inputs**2).sum(0).mean()

    wanted = change.clone().requires_grad_()
    loss = (weight * (residual - inputs @ wanted.T).square().sum(-1)).sum() + ridge * wanted.square().sum()
    (slope,) = torch.autograd.grad(loss, wanted)
    assert slope.abs().max() < 1e-8 * residual.square().sum()


def test_a_planted_map_is_recovered() -> None:
    inputs, _, weight = drawn()
    planted = torch.randn(5, 7, dtype=torch.float64)

    change = solve(summed(inputs, inputs @ planted.T, weight), 1e-10)

    torch.testing.assert_close(change, planted, rtol=0, atol=1e-8)


@given(st.integers(0, 2**20), st.integers(1, 199))
def test_the_error_follows_from_the_sums(seed: int, cut: int) -> None:
    inputs, residual, weight = drawn(seed=seed)
    change = torch.randn(5, 7, dtype=torch.float64)
    sums = summed(inputs[:cut], residual[:cut], weight[:cut])
    sums.add(inputs[cut:], residual[cut:], weight[cut:])

    for each in (None, change):
        left = residual - (0 if each is None else inputs @ each.T)
        direct = (weight * left.square().sum(-1)).mean()
        torch.testing.assert_close(torch.tensor(sums.error(each), dtype=torch.float64), direct)


def test_shares_are_the_mean_of_what_is_left_of_each() -> None:
    parts = [summed(*drawn(tokens, seed=seed)) for tokens, seed in ((200, 0), (30, 1), (90, 2))]
    parts[1].add(*(1000 * each for each in drawn(40, seed=3)))  # of another size
    change = torch.randn(5, 7, dtype=torch.float64)

    left = sum(part.error(change) / part.error(None) for part in parts) / 3

    torch.testing.assert_close(shares(parts).error(change), left)
    torch.testing.assert_close(shares(parts).error(None), 1.0)


def related(tokens: int, noise: float, seed: int, shift: float = 0.0) -> Sums:
    """Residuals that follow from the inputs by a planted map, but for a shift of it and noise."""
    torch.manual_seed(99)
    planted, other = torch.randn(2, 5, 40, dtype=torch.float64)
    inputs, residual, weight = drawn(tokens, 40, 5, seed)
    return summed(inputs, inputs @ (planted + shift * other).T + noise * residual, weight)


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_strength_is_the_best_of_all(noise: float, shift: float) -> None:
    fitted = related(60, noise, 1)
    held = [related(300, noise, 2), related(200, noise, 3, shift)]
    left = {strength: shares(held).error(solve(fitted, strength)) for strength in STRENGTHS}

    best = best_strength(fitted, held)

    if min(left.values()) < 1 - 1e-4:
        assert best is not None
        torch.testing.assert_close(left[best[0]], min(left.values()))
        torch.testing.assert_close(best[1], solve(fitted, best[0]))
    else:
        assert best is None


def test_what_is_right_already_is_left_alone() -> None:
    inputs, residual, weight = drawn()
    held = [summed(inputs, residual, weight), summed(inputs, 0 * residual, weight)]

    assert best_strength(summed(inputs, residual, weight), held) is None


def test_a_strength_too_small_for_rounding_is_none() -> None:
    inputs, residual, weight = drawn()
    twice = torch.cat([inputs, inputs], 1).float()

    assert solve(summed(twice, residual.float(), weight.float()), 0.0) is None
    assert solve(summed(twice, residual.float(), weight.float()), 0.1) is not None


def test_nan_is_an_error() -> None:
    inputs, residual, weight = drawn()
    residual[3, 2] = torch.nan

    with pytest.raises(NotFiniteError):
        solve(summed(inputs, residual, weight), 0.1)
