from __future__ import annotations

from pathlib import Path


def files_of(out: Path) -> dict[str, bytes]:
    """What is in a dump, but for the times in dump.json."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("dump.json", ".seamless_w2vbert-lock")
    }
