"""Let the prebuilt libraries of llama-cpp-py-sync load where the C library is older than 2.38.

    LLAMA_PYTHON benchmarks/serving/old_glibc.py

They were linked where C23 had given ``strtol`` and its kin new names, ``__isoc23_strtol``, of version GLIBC_2.38. All
else in them is older. So the new names are compiled into a library that calls the old ones, which the worker loads
first, and the libraries are told that the version may be missing: it becomes a weak requirement (``VER_FLG_WEAK`` in
the generic ABI's ``vna_flags``). It takes gcc and pyelftools.
"""

import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import IO

NEW = (2, 38)

SOURCE = r"""
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
long __isoc23_strtol(const char *s, char **end, int base) { return strtol(s, end, base); }
unsigned long __isoc23_strtoul(const char *s, char **end, int base) { return strtoul(s, end, base); }
unsigned long long __isoc23_strtoull(const char *s, char **end, int base) { return strtoull(s, end, base); }
int __isoc23_sscanf(const char *s, const char *format, ...) {
    va_list given;
    va_start(given, format);
    int count = vsscanf(s, format, given);
    va_end(given);
    return count;
}
"""


def main() -> None:
    kind, version = platform.libc_ver()
    if kind != "glibc" or tuple(map(int, version.split("."))) >= NEW:
        return
    shim = Path(sys.prefix, "lib", "isoc23.so")
    subprocess.run(["gcc", "-x", "c", "-", "-shared", "-fPIC", "-O1", "-o", shim], input=SOURCE, text=True, check=True)
    spec = find_spec("llama_cpp_py_sync")
    assert spec is not None and spec.origin is not None, "llama-cpp-py-sync is not installed here"
    for library in Path(spec.origin).parent.glob("*.so*"):
        weaken(library)


def weaken(library: Path) -> None:
    """Make the requirement of GLIBC_2.38 weak."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection

    with library.open("r+b") as file:
        parsed = ELFFile(file)
        places = []
        for section in parsed.iter_sections():
            if not isinstance(section, GNUVerNeedSection):
                continue
            names = parsed.get_section(section["sh_link"])
            start, following = section["sh_offset"], 1
            while following:
                following = number(file, start + 12, 4)
                place = start + number(file, start + 8, 4)
                for _ in range(number(file, start + 2, 2)):
                    if names.get_string(number(file, place + 8, 4)) == "GLIBC_2.38":
                        places.append(place + 4)
                    place += number(file, place + 12, 4)
                start += following
        for place in places:
            file.seek(place)
            file.write((2).to_bytes(2, "little"))


def number(file: IO[bytes], place: int, size: int) -> int:
    """A number of so many bytes at a place of a file."""
    file.seek(place)
    return int.from_bytes(file.read(size), "little")


if __name__ == "__main__":
    main()
