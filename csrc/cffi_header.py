"""Turn a header of ``csrc`` into text that cffi's parser takes.

The ``*_api.h`` headers are written for that: no guards, no inlines, no attributes, no shifts in macros.
Only ``#include`` lines and ``extern "C"`` have to go.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
CFLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-D_GNU_SOURCE", "-Wno-unused-parameter"]
# cffi's generated wrapper has parameters that it does not use. No -Werror: a warning that the next compiler has new is
# nothing to a user. `./run lint` adds it.


def cdef(*names: str) -> str:
    """Return the text of the named headers (relative to ``csrc``) without preprocessor includes."""
    lines: list[str] = []
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            if not line.startswith("#include"):
                lines.append(line)
    return "\n".join(lines)


def sources(*folders: str) -> list[str]:
    """Return the C files of the named folders of ``csrc``, relative to the project's root as setuptools wants them."""
    return sorted(f"csrc/{folder}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.c"))


if __name__ == "__main__":
    print(*CFLAGS)
