"""A few small calls of each kernel, for ``compute-sanitizer``: ``python -m tests.gpu.small``."""

from __future__ import annotations

import torch

from tests.gpu.here import DEVICE, wide_ffn
from tests.kernels.cases import assert_exact_enough, draw

CALLS = ((9, 33, 71), (9, 64, 1024), (130, 64, 272))
"""Tokens, model width, hidden units: odd sizes; a split depth; on sm_90 tensor descriptors, with tiles cut off."""


def main() -> None:
    for tokens, d, width in CALLS:
        case = draw((tokens,), d, width, torch.float16).to(DEVICE)
        assert_exact_enough(wide_ffn(case), case)
    print("small calls: right")


if __name__ == "__main__":
    main()
