"""Random problems, small enough to try every choice, and one of the size of the largest models."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.planning.candidates import Candidate
from fxfuse.planning.costs import Use
from fxfuse.planning.solvers.problem import Limit, Problem


@st.composite
def problems(draw: st.DrawFn, most: int = 9) -> Problem:
    """Up to ``most`` candidates on a few branches, pairs of either sign, and up to four limits."""
    amounts = st.integers(0, 8).map(float)
    names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True)
    made = [
        Candidate(Plan(drop=draw(names)), draw(amounts), Use(draw(amounts), draw(amounts), draw(amounts)))
        for _ in range(draw(st.integers(1, most)))
    ]
    pairs = {pair: draw(st.integers(-2, 4)) / 2 for pair in combinations(range(len(made)), 2) if draw(st.booleans())}
    limits = [
        Limit(resource, draw(st.integers(0, 40)) / 2, resource)
        for resource in ("seconds", "memory", "cache", "kl")
        if draw(st.booleans())
    ]
    return Problem(tuple(made), Use(20.0, 20.0, 20.0), tuple(limits), pairs)


def large(layers: int = 126, share: float = 0.7, max_group: int = 4, seed: int = 0) -> Problem:
    """Drops of attentions and FFNs, linear maps and intervals of ``layers`` layers; pairs of all of them.

    The candidates' changes are vectors of which those of neighbours are alike, and a pair's term is what the square
    of a sum of two has beyond the sum of their squares.
    """
    draw = np.random.default_rng(seed)
    changes = draw.normal(size=(2 * layers, 24)) * draw.uniform(0.02, 0.1, size=(2 * layers, 1))
    changes = (changes + np.roll(changes, 1, axis=0) / 2) / 5
    edits = [(Plan(drop=[f"a{k}"]), changes[2 * k], 1.0) for k in range(layers)]
    edits += [(Plan(drop=[f"f{k}"]), changes[2 * k + 1], 2.0) for k in range(layers)]
    edits += [(Plan(linear=[f"a{k}"]), changes[2 * k] * 0.7, 0.7) for k in range(layers)]
    for size in range(2, max_group + 1):
        for k in range(layers - size + 1):
            gone = [f"a{j}" for j in range(k + 1, k + size)]
            moved = [changes[2 * j] + changes[2 * j + 1] * 0.5 for j in range(k + 1, k + size)]
            edits.append(
                (Plan(drop=gone, parallel=[[f"f{j}" for j in range(k, k + size)]]), sum(moved), 1.3 * (size - 1))
            )
    vectors = np.array([change for _, change, _ in edits])
    gram = vectors @ vectors.T
    made = tuple(Candidate(edit, float(gram[k, k]), Use(gain, gain, gain)) for k, (edit, _, gain) in enumerate(edits))
    pairs = {(i, j): float(2 * gram[i, j]) for i, j in combinations(range(len(made)), 2)}
    total = 3.2 * layers
    return Problem(made, Use(total, total, total), (Limit("seconds", share * total, "target_latency"),), pairs)
