"""Claim, modelled: the kernels reach 85% of the bandwidth for 1 and 16 tokens, 75% of a vendor's GEMM for 2,048.

    python benchmarks/kernels.py [--gpus h100 h200 a100] [--fused 1 4] [--json FILE]

Nothing is measured. bfloat16, SwiGLU; model widths 2,048 and 4,096 on one GPU, 8,192 and 16,384 on eight. The model is
`fxfuse.hardware.times`: what it takes from data sheets and from others' measurements, and what it assumes, is written
to the file beside the numbers. The time of a kernel includes its launch. A row that misses its aim says so.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fxfuse.hardware import gpus, times
from fxfuse.hardware.cost import Layer, gemms
from fxfuse.hardware.gpus import Gpu
from fxfuse.hardware.pick import pick

GEOMETRIES = ((2048, 8192, 1), (4096, 14336, 1), (8192, 28672, 8), (16384, 53248, 8))
"""Model width, hidden units of one FFN, GPUs that share it."""
TOKENS = (1, 16, 2048)
BANDWIDTH, THROUGHPUT = 0.85, 0.75
"""Aims: of the data sheet's bandwidth with few tokens, of a vendor's GEMM with many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=["h100", "h200", "a100"], choices=list(gpus.GPUS))
    parser.add_argument("--fused", type=int, nargs="+", default=[1, 4], help="FFNs in the wide one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for name in arguments.gpus
        for geometry in GEOMETRIES
        for fused in arguments.fused
        for tokens in TOKENS
        for row in modelled(gpus.find(name), geometry, fused, tokens)
    ]
    show(rows)
    if arguments.json:
        results = {
            "modelled": True,
            "sources": {"hardware": " ".join((gpus.__doc__ or "").split()), "model": " ".join(times.__doc__.split())},
            "assumptions": asdict(times.USUAL),
            "gpus": {name: asdict(gpus.find(name)) for name in arguments.gpus},
            "rows": rows,
        }
        arguments.json.write_text(_text(results))


def modelled(gpu: Gpu, geometry: tuple[int, int, int], fused: int, tokens: int) -> list[dict[str, Any]]:
    """Both kernels."""
    d, width, parallel = geometry
    rows = []
    for number, gemm in enumerate(gemms(Layer(d, width, tokens, parallel), fused), 1):
        config = pick(gemm, gpu)
        own = times.own_gemm(gemm, config, gpu)
        few = tokens <= 16
        share = times.ideal(gemm, gpu) if few else times.library_gemm(gemm, gpu).seconds
        aim = BANDWIDTH if few else THROUGHPUT
        rows.append(
            {
                "gpu": gpu.name,
                "d": d,
                "f": width,
                "tensor_parallel": parallel,
                "fused": fused,
                "tokens": tokens,
                "kernel": f"K{number}",
                "tile": f"{config.rows}x{config.columns}x{config.depth}",
                "split": config.split,
                "tma": config.tma,
                "us": round(own.seconds * 1e6, 2),
                "of": "bandwidth" if few else "a vendor's GEMM",
                "share": round(share / own.seconds, 4),
                "aim": aim,
                "met": share / own.seconds >= aim,
            }
        )
    return rows


def _text(results: dict[str, Any]) -> str:
    """JSON with one row a line."""
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each GPU, geometry and number of FFNs; what misses its aim is in brackets."""
    columns = [f"K{number}, M = {tokens}" for tokens in TOKENS for number in (1, 2)]
    print("MODELLED, not measured. For M = 1 and 16 of the bandwidth, for M = 2048 of a vendor's GEMM.")
    print(f"| GPU | d, f | FFNs | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 3) + "|")
    lines: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        share = "TP" + str(row["tensor_parallel"]) if row["tensor_parallel"] > 1 else "1 GPU"
        key = (row["gpu"], f"{row['d']}, {row['f']}, {share}", row["fused"])
        text = f"{row['share']:.1%}"
        lines.setdefault(key, []).append(text if row["met"] else f"({text})")
    for (name, shape, fused), cells in lines.items():
        print(f"| {name} | {shape} | {fused} | {' | '.join(cells)} |")
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} meet their aim")


if __name__ == "__main__":
    main()
