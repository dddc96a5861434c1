from __future__ import annotations

import subprocess
from pathlib import Path


def files_of(out: Path) -> dict[str, bytes]:
    """What is in a dump, but for the times in dump.json."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("dump.json", ".seamless_w2vbert-lock")
    }


def small_disk(folder: Path) -> bool:
    """Mount a file system of 1.5 MB; False where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    return mounted.returncode == 0
