"""Every config of the table, compiled for every GPU that it serves, without one."""

import pytest
import torch
import triton
from _pytest.mark import ParameterSet
from torch import Tensor

from fxfuse.errors import KernelError
from fxfuse.hardware.configs import COUNTERS, LOOP_ROWS, TABLE, Config, Row
from fxfuse.hardware.gpus import SHARED_BYTES, Gpu, find
from fxfuse.kernels import down, gate_up
from fxfuse.kernels.calls import ACTIVATIONS, Down, GateUp
from fxfuse.kernels.compile import Compiled, compile_launch
from fxfuse.kernels.launch import wide_work

SPILLS = 16
"""Bytes a thread may spill: what the assembler puts aside once, outside the loop."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(
    row: Row,
    arch: int,
    dtype: torch.dtype,
    split: int = 4,
    gated: bool = True,
    gain: bool = False,
    rstd: bool = False,
    activation: str = "silu",
) -> Compiled:
    """A row's kernel for tokens, model width and hidden units of the alignment that it serves."""
    M, d, F = (96, 1024, 4096) if row.aligned else (97, 1023, 4095)

    def own(*shape: int) -> Tensor:
        return meta(*shape, dtype=dtype)

    counters = meta(COUNTERS, dtype=torch.int32)
    if row.kernel == "gate_up":
        factors = meta(M, dtype=torch.float32) if rstd else None
        projections = 2 if gated else 1
        weights = own(projections, F, d), own(projections, F), own(d) if gain else None
        call = GateUp(own(M, d), *weights, factors, None if rstd else 1e-6, activation)
        return compile_launch(gate_up.launch(call, row.config, own(M, F), counters), arch)
    config = Config(**{**vars(row.config), "split": split})
    call = Down(own(M, F), own(d, F), own(M, d), own(d))
    return compile_launch(down.launch(call, config, own(M, d), counters), arch)


def lines(kernel: str | None = None) -> list[ParameterSet]:
    """The table's lines, each with every architecture that it serves."""
    return [
        pytest.param(row, arch, id=f"{index}-sm{arch}")
        for index, row in enumerate(TABLE)
        for arch in row.arch
        if kernel in (None, row.kernel)
    ]


def assert_sound(made: Compiled, row: Row) -> None:
    config, found = row.config, made.instructions
    assert made.spilled_bytes <= SPILLS
    assert made.shared_bytes <= SHARED_BYTES[made.capability]
    tensor_cores = row.bits == 16
    if tensor_cores and made.capability == 90 and config.rows >= 64:
        assert found["wgmma"]
        assert not found["mma"]
    else:
        assert bool(found["mma"]) == tensor_cores
    assert bool(found["tma load"]) == config.tma
    assert bool(found["tma store"]) == (config.tma and row.kernel == "gate_up")
    # cp.async copies 4 bytes at least, so odd rows of 2-byte elements go through registers.
    assert bool(found["cp.async"]) == (not config.tma and (row.aligned or row.bits == 32))


@pytest.mark.parametrize(("row", "arch"), lines())
def test_a_config_fits_its_gpu(row: Row, arch: int) -> None:
    dtype = torch.bfloat16 if row.bits == 16 else torch.float32
    # As it is launched: large tiles are given the norm's factors, small ones take the statistics along.
    assert_sound(compiled(row, arch, dtype, rstd=row.config.rows > LOOP_ROWS), row)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "arch"), lines("gate_up"))
@pytest.mark.parametrize("variant", [{"gated": False}, {"gain": True}], ids=["plain", "gain"])
def test_every_form_of_gate_up_fits(row: Row, arch: int, variant: dict[str, bool]) -> None:
    dtype = torch.float16 if row.bits == 16 else torch.float32
    made = compiled(row, arch, dtype, rstd=row.config.rows > LOOP_ROWS, **variant)
    assert made.spilled_bytes <= SPILLS
    assert made.shared_bytes <= SHARED_BYTES[arch]


@pytest.mark.slow
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "silu"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=str(index))
        for index, row in enumerate(TABLE)
        if row.kernel == "gate_up" and row.config.rows >= 64
    ],
)
def test_every_activation_fits(row: Row, activation: str) -> None:
    dtype = torch.bfloat16 if row.bits == 16 else torch.float32
    assert_sound(compiled(row, row.arch[0], dtype, rstd=True, activation=activation), row)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "arch"), lines("down"))
def test_an_unsplit_depth_fits(row: Row, arch: int) -> None:
    made = compiled(row, arch, torch.float16 if row.bits == 16 else torch.float32, split=1)
    assert_sound(made, row)
    assert not made.instructions["atom"]


def wide(M: int, d: int, F: int, gpu: str | Gpu) -> list[Compiled]:
    call = GateUp(meta(M, d), meta(2, F, d), eps=1e-6)
    gpu = find(gpu) if isinstance(gpu, str) else gpu
    work = wide_work(call, meta(d, F), meta(M, d), None, gpu)
    return [compile_launch(launch, gpu.capability) for launch in work.launches]


@pytest.mark.parametrize("tokens", [1, 4096])
def test_four_ffns_of_the_largest_llama_compile(tokens: int) -> None:
    # 2^31 elements lie between a gate and its up: offsets of 32 bits would not reach.
    for made in wide(tokens, 16384, 4 * 53248, "h100"):
        assert made.spilled_bytes <= SPILLS


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize(("capability", "shared"), [(89, 101_376), (100, 232_448), (120, 101_376)])
def test_gpus_that_have_no_configs_of_their_own_run_those_of_others(capability: int, shared: int, tokens: int) -> None:
    for made in wide(tokens, 4096, 14336, Gpu("some", capability, 140)):
        assert made.spilled_bytes <= SPILLS
        assert made.shared_bytes <= shared


def test_sizes_of_one_compile() -> None:
    """Triton takes an argument of 1 for a constant."""
    for made in wide(1, 1, 1, "h100"):
        assert made.spilled_bytes <= SPILLS


def test_one_compilation_serves_every_number_of_tokens() -> None:
    assert [made.ptx for made in wide(1, 1024, 4096, "a100")] == [made.ptx for made in wide(16, 1024, 4096, "a100")]
    assert [made.ptx for made in wide(129, 1024, 4096, "h100")] == [made.ptx for made in wide(176, 1024, 4096, "h100")]


def test_a_split_depth_publishes_its_part_before_it_counts_itself_in() -> None:
    row = next(row for row in TABLE if row.kernel == "down" and 90 in row.arch)
    ptx = compiled(row, 90, torch.bfloat16).ptx
    before, after = ptx.split("atom.global.gpu.acq_rel.add")
    stores = before.rindex("st.global.cg")
    assert "bar.sync" in before[stores:]
    assert "bar.sync" in after[: after.index("ld.global.cg")]


def test_the_driver_is_left_as_it_was() -> None:
    before = triton.runtime.driver._active
    compiled(TABLE[-1], 90, torch.float32)
    assert triton.runtime.driver._active is before


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(KernelError, match="compile them in another"):
        compiled(TABLE[-1], 90, torch.float32)
