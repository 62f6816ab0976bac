"""Installs into `.gpu` what this Python lacks of the wheels in `wheels`, without a network: ``make gpu OFFLINE=1``.

What it has, torch above all, stays as it is: a second pytest beside its plugins could not work with them. A virtual
environment would not do: where this Python is itself in one, it would not see that one's packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    wheels = sorted((ROOT / "wheels").glob("*.whl"))
    if not wheels:
        sys.exit("there are no wheels: where there is a network, run make gpu-wheels, and bring the folder along")
    shutil.rmtree(ROOT / ".gpu", ignore_errors=True)
    missing = [str(wheel) for wheel in wheels if not _is_installed(wheel.name.partition("-")[0])]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(ROOT / ".gpu"), *missing], check=True)
    print("installed in .gpu:", ", ".join(Path(wheel).name for wheel in missing) or "nothing, all is there")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
