"""The only door to fairseq2: one module per supported generation, same names in both.

Comes in: nothing. Goes out: :func:`load`, the module for whichever fairseq2 is
installed. No other part of the package imports fairseq2 or asks its version.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seamless_w2vbert.errors import StackError

if TYPE_CHECKING:
    from seamless_w2vbert.stack import current, seamless
    from seamless_w2vbert.stack.protocol import Stack

_MODULES = {"0.2": "seamless", "0.8": "current"}

_INSTALL_HINT = (
    "install one with `pip install seamless_w2vbert` (fairseq2 0.8) or "
    "`pip install '.[seamless]'` (fairseq2 0.2, beside "
    "seamless_communication)"
)


def fairseq2_generation() -> str:
    """Return ``"0.2"`` or ``"0.8"``, whichever fairseq2 is installed.

    :raises StackError: if fairseq2 is absent or of another generation.
    """
    try:
        installed = version("fairseq2")
    except PackageNotFoundError:
        raise StackError(f"fairseq2 is not installed; {_INSTALL_HINT}.") from None

    generation = ".".join(installed.split(".")[:2])

    if generation not in _MODULES:
        raise StackError(
            f"fairseq2 {installed} is installed, but only 0.2.x and 0.8.x are "
            f"supported; {_INSTALL_HINT}."
        )

    return generation


def preload_libsndfile() -> Path | None:
    """Load the libsndfile that the soundfile wheel carries, for fairseq2n to find.

    fairseq2n opens ``libsndfile.so.1`` when it is imported and gives up if the
    system has none. A library of that name that is already in the process is
    taken instead, so no system package is needed, and every machine decodes with
    the same version.

    :returns: the library that was loaded, or None where the wheel carries none.
    """
    spec = importlib.util.find_spec("_soundfile_data")

    if spec is None or not spec.submodule_search_locations:
        return None

    suffix = ".dylib" if sys.platform == "darwin" else ".so"

    for directory in spec.submodule_search_locations:
        for library in sorted(Path(directory).glob(f"libsndfile*{suffix}")):
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:  # built for another processor
                continue

            return library

    return None


@cache
def load() -> Stack:
    """Import and return the stack module for the installed fairseq2.

    :raises StackError: if fairseq2 is absent, unsupported, or fails to import.
    """
    name = _MODULES[fairseq2_generation()]

    preload_libsndfile()

    try:
        module: Any = importlib.import_module(f"seamless_w2vbert.stack.{name}")
    except (ImportError, OSError) as ex:
        raise StackError(
            f"fairseq2 {version('fairseq2')} is installed but cannot be imported: "
            f"{ex}. Run `seamless-w2vbert doctor` to see what is wrong."
        ) from ex

    stack: Stack = module

    return stack


if TYPE_CHECKING:
    # Both modules offer what the protocol asks for.
    _seamless: Stack = seamless
    _current: Stack = current
