"""On what it was measured: the machine, the versions, the threads.

Comes in: a device. Goes out: plain values for the report, without which no figure of
speed means anything.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from seamless_w2vbert import stack

_PACKAGES = (
    "seamless_w2vbert",
    "fairseq2",
    "torch",
    "transformers",
    "seamless_communication",
    "ctranslate2",
    "numpy",
)


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Return the processor, the memory, the GPU and how torch uses them."""
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": num_cores(),
        "memory_gb": _memory_gb(),
        "system": platform.platform(),
        "instructions": _instructions(),
        "threads": threads,
        "device": str(device),
        "stack": stack.load().NAME,
    }

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_gb"] = round(properties.total_memory / 2**30, 1)
        machine["cuda"] = torch.version.cuda

    return machine


def versions() -> dict[str, str]:
    """Return the versions of what is compared, where installed."""
    found = {"python": platform.python_version()}

    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue

    return found


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass

    return platform.processor() or platform.machine()


def _instructions() -> str:
    capability = str(torch.backends.cpu.get_cpu_capability())
    if _has_bf16_instructions():
        capability += ", bfloat16 instructions"
    return capability


def _has_bf16_instructions() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False

    return "avx512_bf16" in flags or "amx_bf16" in flags


def _memory_gb() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None

    return round(total / 2**30, 1)
