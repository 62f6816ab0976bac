"""``fxfuse kernels``: what a wide FFN launches on a GPU, what that compiles to, and what it should cost."""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.shared import DType, Json, Line, app, show_lines

if TYPE_CHECKING:
    from fxfuse.hardware.cost import Layer
    from fxfuse.hardware.gpus import Gpu


@app.command()
def kernels(
    gpu: Annotated[str, typer.Option(help="a100, a10, a6000, h100, h200 or b100")] = "h100",
    hidden: Annotated[int, typer.Option(min=1, help="model width")] = 4096,
    width: Annotated[int, typer.Option(min=1, help="hidden units of one FFN")] = 14336,
    fused: Annotated[int, typer.Option(min=1, help="FFNs that become one")] = 4,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="tokens in a call; may be repeated")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share each FFN")] = 1,
    dtype: Annotated[DType, typer.Option()] = DType.bfloat16,
    compile: Annotated[bool, typer.Option("--compile", help="compile them, too; no GPU is needed")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="measure tiles on this machine's GPU, and keep the best")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a wide FFN launches on a GPU, and what it should cost.

    Times are modelled from data sheets, not measured: FFNs one after the
    other, and as one wide FFN in fxfuse's kernels. No GPU is needed.

    [bold]Examples[/bold]
      fxfuse kernels
      fxfuse kernels --gpu a100 --hidden 8192 --width 28672 --tensor-parallel 8
      fxfuse kernels --tokens 1 --tokens 512 --compile --json
    """
    import torch

    from fxfuse.hardware import gpus
    from fxfuse.hardware.cost import Layer

    figures = gpus.find(gpu)
    layers = [
        Layer(hidden, width, count, tensor_parallel, getattr(torch, dtype)) for count in sorted(tokens or [1, 32, 2048])
    ]
    results: dict[str, list[Line]] = {
        "modelled": [line for layer in layers for line in _modelled(layer, fused, figures)]
    }
    results["kernels"] = [line for layer in layers for line in _each_kernel(layer, fused, figures)]
    if compile:
        results["compiled"] = [line for layer in layers for line in _compiled(layer, fused, figures)]
    if tune:
        results["measured"] = [line for layer in layers for line in _tuned(layer, fused)]
    if json:
        typer.echo(json_format.dumps({"gpu": figures.name, **results}, indent=1))
        return
    titles = {"kernels": f"modelled, kernel by kernel, {figures.name}", "measured": "measured, on the GPU here"}
    for key, lines in results.items():
        typer.echo(titles.get(key, f"{key}, {figures.name}"))
        show_lines(lines)


def _modelled(layer: Layer, fused: int, gpu: Gpu) -> list[Line]:
    from fxfuse.hardware import cost

    before, after = cost.sequential(layer, fused, gpu), cost.fused(layer, fused, gpu)
    floor = cost.roofline(layer, fused, gpu)
    return [
        {
            "tokens": layer.tokens,
            "FFNs": how,
            "launches": estimate.launches,
            "all-reduces": estimate.all_reduces,
            "MB": round(estimate.bytes / 1e6, 1),
            "GFLOP": round(estimate.flops / 1e9, 1),
            "waves": round(estimate.waves, 1),
            "us": round(estimate.seconds * 1e6, 1),
            "to roofline": round(estimate.seconds / floor, 2),
            "speed-up": round(before.seconds / estimate.seconds, 2),
        }
        for how, estimate in (("sequential", before), ("fused", after))
    ]


def _each_kernel(layer: Layer, fused: int, gpu: Gpu) -> list[Line]:
    """The two kernels of the wide FFN: their tiles, and how far each is from the hardware and from a vendor's GEMM."""
    from fxfuse.hardware import times
    from fxfuse.hardware.cost import gemms
    from fxfuse.hardware.pick import pick

    lines: list[Line] = []
    for gemm in gemms(layer, fused):
        config = pick(gemm, gpu)
        own, library = times.own_gemm(gemm, config, gpu), times.library_gemm(gemm, gpu)
        lines.append(
            {
                "tokens": layer.tokens,
                "kernel": gemm.kernel,
                "tile": f"{config.rows}x{config.columns}x{config.depth}",
                "split": config.split,
                "loads": "TMA" if config.tma else "pointers",
                "waves": round(own.waves, 1),
                "us": round(own.seconds * 1e6, 1),
                "of roofline": round(times.ideal(gemm, gpu) / own.seconds, 2),
                "of a vendor's GEMM": round(library.seconds / own.seconds, 2),
            }
        )
    return lines


def _compiled(layer: Layer, fused: int, gpu: Gpu) -> list[Line]:
    import torch

    from fxfuse.hardware.cost import gemms
    from fxfuse.kernels.calls import GateUp
    from fxfuse.kernels.requirements import require_triton

    require_triton()
    from fxfuse.kernels.compile import compile_launch
    from fxfuse.kernels.launch import wide_work

    first, _ = gemms(layer, fused)

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=layer.dtype, device="meta")

    tokens, weights = meta(first.M, first.K), meta(2, first.N, first.K)
    work = wide_work(GateUp(tokens, weights, eps=1e-6), meta(first.K, first.N), tokens, None, gpu)
    lines: list[Line] = []
    for launch in work.launches:
        made, size = compile_launch(launch, gpu.capability), launch.arguments
        lines.append(
            {
                "tokens": layer.tokens,
                "kernel": made.name,
                "tile": "x".join(str(size[name]) for name in ("BM", "BN", "BK") if name in size),
                "split": str(size.get("SPLIT", 1)),
                "warps": launch.warps,
                "stages": launch.stages,
                "registers": made.registers,
                "spilled bytes": made.spilled_bytes,
                "shared bytes": made.shared_bytes,
                "instructions": ", ".join(f"{count} {name}" for name, count in made.instructions.items() if count),
            }
        )
    return lines


def _tuned(layer: Layer, fused: int) -> list[Line]:
    import torch

    from fxfuse.errors import KernelError
    from fxfuse.hardware import gpus
    from fxfuse.hardware.cost import gemms
    from fxfuse.kernels.requirements import require_triton

    require_triton()
    from fxfuse.kernels.tune import cache_file, stopwatch, tune

    if not torch.cuda.is_available():
        raise KernelError("there is no GPU here to measure on; leave --tune out, or run it where the model will run")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpus.of_device(device)
    lines: list[Line] = []
    for gemm in gemms(layer, fused):
        measure = stopwatch(gemm, device)
        best = tune(gemm, gpu, measure)
        lines.append(
            {
                "tokens": layer.tokens,
                "kernel": gemm.kernel,
                "tile": f"{best.rows}x{best.columns}x{best.depth}",
                "split": best.split,
                "warps": best.warps,
                "stages": best.stages,
                "us": round(measure(best) * 1e6, 1),
                "kept in": str(cache_file(gpu)),
            }
        )
    return lines
