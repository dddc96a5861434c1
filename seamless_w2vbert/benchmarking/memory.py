"""How much memory a process takes, and the most it took since a mark.

Comes in: nothing. Goes out: bytes. Linux keeps a high-water mark that can be set back;
elsewhere only the highest of the whole life is known. CUDA memory is torch's own count.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from typing import Any, Protocol


class Meter(Protocol):
    """Tells the peak since the last :meth:`reset`, in bytes."""

    def now(self) -> int:
        """What is taken at this moment."""

    def reset(self) -> None:
        """Forget the peak."""

    def peak(self) -> int:
        """The most since then."""


class HostMeter:
    """The resident memory of this process."""

    def now(self) -> int:
        return _status("VmRSS") or _life_time_peak()

    def reset(self) -> None:
        # What the C library keeps for later would count as taken.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

        # 5 sets the high-water mark back to what is resident (proc(5)). Where that is
        # not allowed, a peak is that of the whole life, so never too small.
        with (
            contextlib.suppress(OSError),
            open("/proc/self/clear_refs", "w") as file,
        ):
            file.write("5")

    def peak(self) -> int:
        return _status("VmHWM") or _life_time_peak()


class CudaMeter:
    """The memory that torch has allocated on a CUDA device."""

    def __init__(self, torch: Any, device: str) -> None:
        self._cuda, self._device = torch.cuda, device

    def now(self) -> int:
        return int(self._cuda.memory_allocated(self._device))

    def reset(self) -> None:
        self._cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(self._cuda.max_memory_allocated(self._device))


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024

    return None


def _life_time_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
