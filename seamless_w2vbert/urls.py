"""URLs such as ``s3://bucket/a.wav``, which fsspec reads and writes.

Comes in: text. Goes out: whether it is a URL, and the filesystem behind it.
"""

from __future__ import annotations

import re
from typing import Any


def is_url(path: str) -> bool:
    """Tell whether ``path`` is a URL, such as ``s3://bucket/a.wav``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[a-z0-9]+)*://", path) is not None


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem for a URL, and the path of the URL within it.

    :raises ImportError: if the package that reaches it is not installed.
    :raises ValueError: if no filesystem is known for it.
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)

    return fs, path
