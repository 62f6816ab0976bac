"""``python -m benchmarks.gpu``; see the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import benchmarks.gpu

PARTS = "abcde"
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU: nothing is measured")
    arguments = parser.parse_args()
    if arguments.rehearse:  # before Triton and numpy are imported
        os.environ.update(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
        from tests.kernels.interpreted import faithful

        faithful.take_new_numpy()
    from benchmarks.gpu import whole

    well = whole.run(arguments.out, sorted(arguments.parts), arguments.minutes, arguments.rehearse)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
