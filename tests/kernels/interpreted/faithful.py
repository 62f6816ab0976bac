"""Makes Triton's interpreter compute in bfloat16 as a GPU does.

The interpreter keeps bfloat16 as uint16 and, as it stands (3.7 to 3.9, triton#11584), multiplies these bit patterns in
``tl.dot`` and in arithmetic, and truncates where a GPU rounds to nearest even. Here every operation on bfloat16 is done
in float32 on the values, and rounded once. `test_faithful.py` compares the result with torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def values(bits: np.ndarray) -> np.ndarray:
    """What bfloat16 bits mean, as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(floats: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; a NaN stays one."""
    floats = np.ascontiguousarray(floats, dtype=np.float32)
    bits = floats.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(floats), np.uint16(0x7FC0), nearest).astype(np.uint16)


def take_new_numpy() -> None:
    """Let loops of kernels count under numpy 2.4 too, which takes arrays of one element for numbers no more.

    Triton 3.6 hands it such; from 3.7 on it does itself what is done here.
    """
    stock = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: interpreter._LangPatchScope) -> None:
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def install() -> None:
    """Patch the interpreter of this process."""
    take_new_numpy()
    builder = InterpreterBuilder
    stock_cast, stock_convert = builder.cast_impl, builder.create_fp_to_fp
    stock_dot, stock_binary, stock_unary = builder.create_dot, builder.binary_op, builder.unary_op

    def cast(self: InterpreterBuilder, source: TensorHandle, type: tl.dtype) -> TensorHandle:
        target = type.scalar
        if _is_bfloat16(source) and target != tl.bfloat16:
            if target == tl.float32:
                return TensorHandle(values(source.data), target)
            return stock_cast(self, TensorHandle(values(source.data), tl.float32), type)
        if target == tl.bfloat16 and not _is_bfloat16(source):
            return TensorHandle(rounded(source.data.astype(np.float32)), target)
        return stock_cast(self, source, type)

    def convert(self: InterpreterBuilder, source: TensorHandle, type: tl.dtype, rounding: object) -> TensorHandle:
        if type.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(rounded(source.data), type.scalar)
        return stock_convert(self, source, type, rounding)

    def dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, acc: TensorHandle, precision: object, sums: object
    ) -> TensorHandle:
        if _is_bfloat16(a) and _is_bfloat16(b):
            product = np.matmul(values(a.data), values(b.data))  # products are exact, sums float32
            return TensorHandle(product.astype(acc.data.dtype) + acc.data, acc.dtype.scalar)
        return stock_dot(self, a, b, acc, precision, sums)

    def binary(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, op: Callable[..., np.ndarray]
    ) -> TensorHandle:
        if _is_bfloat16(a) and _is_bfloat16(b):
            result = op(values(a.data), values(b.data))
            if result.dtype == np.bool_:
                return TensorHandle(result, tl.int1)
            return TensorHandle(rounded(result), tl.bfloat16)
        return stock_binary(self, a, b, op)

    def unary(self: InterpreterBuilder, a: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        if _is_bfloat16(a):
            return TensorHandle(rounded(op(values(a.data))), tl.bfloat16)
        return stock_unary(self, a, op)

    builder.cast_impl, builder.create_fp_to_fp = cast, convert
    builder.create_dot, builder.binary_op, builder.unary_op = dot, binary, unary
    # All tensors are on the CPU, so kernels write where they should; the stock copies whole storages onto themselves.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """The programs of a launch run in a random order, as on a GPU they may finish in any."""
    stock = InterpreterBuilder.set_grid_idx
    orders: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}

    def set_grid_idx(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        grid = self.grid_dim
        if grid not in orders:
            orders[grid] = [(i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])]
            random.Random(seed).shuffle(orders[grid])
        stock(self, *orders[grid][(x * grid[1] + y) * grid[2] + z])

    InterpreterBuilder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = stock


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16
