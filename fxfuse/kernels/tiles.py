"""What the Triton kernels share: the order of tiles, sums of squares, activations.

Offsets inside a tile are int32, the tile's own offset is int64: a wide FFN's weights have more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of this program's tile of ``[M, N]``, and the tile's number.

    GROUP tiles of rows go through the columns together, so that a tile of weights is used while it is still in L2.
    """
    tile = tl.program_id(0)
    column_tiles = tl.cdiv(N, BN)
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    inside = tile % (GROUP * column_tiles)
    return (first + inside % height) * BM, (inside // height) * BN, tile


@triton.jit
def corner(pointer, row, stride):
    """Where a tile begins: the address of row ``row``."""
    return pointer + row.to(tl.int64) * stride


@triton.jit
def squares(x):
    """The sum of squares of each row, float32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """``act(v)``, float32; the names are `fxfuse.kernels.calls.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        return v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(t)) / 2 is sigmoid(2t), and Triton has no tanh of its own.
        return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "sigmoid":
        return tl.sigmoid(v)
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2", "unknown activation")
        positive = tl.where(v < 0.0, 0.0, v)  # a NaN stays one, as in torch
        return positive if ACTIVATION == "relu" else positive * positive
