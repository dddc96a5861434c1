"""How fast, side by side: this package, its peers, and what the machine could do.

Comes in: a model, inputs, the names of sides. Goes out: :class:`Benchmark`: medians of
interleaved runs, ratios, peak memory, whether the output is right, and hours of audio
per hour for the stream. The command ``seamless-w2vbert bench`` prints it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamless_w2vbert.benchmarking.measure import DEFAULT_CASES as DEFAULT_CASES
    from seamless_w2vbert.benchmarking.measure import benchmark as benchmark
    from seamless_w2vbert.benchmarking.models import RANDOM_600M as RANDOM_600M
    from seamless_w2vbert.benchmarking.results import Benchmark as Benchmark
    from seamless_w2vbert.benchmarking.results import Case as Case
    from seamless_w2vbert.benchmarking.results import CorpusRates as CorpusRates
    from seamless_w2vbert.benchmarking.results import Measurement as Measurement
    from seamless_w2vbert.benchmarking.results import Throughput as Throughput

_HOMES = {
    "DEFAULT_CASES": "measure",
    "benchmark": "measure",
    "RANDOM_600M": "models",
    "Benchmark": "results",
    "Case": "results",
    "CorpusRates": "results",
    "Measurement": "results",
    "Throughput": "results",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # When first used: a side's process imports nothing that its side does not need.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
