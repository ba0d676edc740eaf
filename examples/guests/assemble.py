"""Assemble the guests of ``unicorn_embed.py`` into ``.hex`` files: needs ``cc`` on x86-64 and ``llvm-mc``.

With ``--check`` nothing is written; exit code 1 if a file is not what its source gives. Architectures whose assembler
is not here are left alone.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def text_section(elf: bytes) -> bytes:
    """Return the bytes of ``.text`` of a 64-bit little-endian ELF object."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(elf[at : at + size], "little")

    table, each, count, names = number(0x28, 8), number(0x3A, 2), number(0x3C, 2), number(0x3E, 2)
    sections = [table + i * each for i in range(count)]
    strings = number(sections[names] + 0x18, 8)
    for section in sections:
        if elf[strings + number(section, 4) :].startswith(b".text\0"):
            offset = number(section + 0x18, 8)
            return elf[offset : offset + number(section + 0x20, 8)]
    raise ValueError("no .text")


def assembler(source: Path, output: Path) -> list[str] | None:
    """Return the command, None if there is no assembler for it here."""
    if source.stem == platform.machine() and shutil.which("cc"):
        return ["cc", "-c", str(source), "-o", str(output)]
    if source.stem != "x86_64" and shutil.which("llvm-mc"):
        return ["llvm-mc", f"--triple={source.stem}", "--filetype=obj", str(source), "-o", str(output)]
    return None


def main() -> int:
    stale = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "guest.o"
        for source in sorted(HERE.glob("*.s")):
            command = assembler(source, output)
            if command is None:
                continue
            subprocess.run(command, check=True)
            code = text_section(output.read_bytes()).hex()
            text = "".join(code[i : i + 64] + "\n" for i in range(0, len(code), 64))
            target = source.with_suffix(".hex")
            if "--check" not in sys.argv:
                target.write_text(text)
            elif target.read_text() != text:
                stale.append(target.name)
            print(f"{source.stem}: {len(code) // 2} bytes")
    for name in stale:
        print(f"{name} is not what its source gives", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
