"""A side in a process of its own: its memory is its own, and it can be stopped.

Comes in: jobs, one JSON object per line. Goes out: results, likewise. The parent's end
is :class:`Worker`; the child's is this module run as a program.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seamless_w2vbert import errors
from seamless_w2vbert.benchmarking import memory, sides
from seamless_w2vbert.benchmarking.results import State
from seamless_w2vbert.benchmarking.sides import MissingSideError, Settings

_WARM_UP_FRAMES = 98
"""A second of fbank, to have everything allocated that stays."""

SHORT = 5.0
"""Seconds. A shorter run is timed right after another: threads that have slept while
other sides ran may take a tenth of a second to be spread over the cores again."""

_MAX_REASON = 300


# -- the parent's end ----------------------------------------------------------------


class SideError(Exception):
    """A job could not be done; what the report will say of it."""

    def __init__(self, state: State, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.state: State = state
        self.reason = reason
        self.kind = kind

    def as_package_error(self) -> errors.SeamlessW2vBertError:
        """Return what the child raised, if it was one of this package's errors."""
        found = getattr(errors, self.kind, errors.SeamlessW2vBertError)
        error: errors.SeamlessW2vBertError = found(self.reason)
        return error


class Worker:
    """A child process that does one job at a time."""

    def __init__(self, threads: int) -> None:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        count = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, what: str, timeout: float | None = None, **job: Any) -> Any:
        """Have a job done and return its result.

        :param timeout: seconds after which the child is stopped.
        :raises SideError: if it fails, takes longer, or dies.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **job}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise SideError("too slow", f"stopped after {timeout:g} s") from None
        except (OSError, ValueError):
            line = ""  # it has ended, or has been ended

        if not line:
            raise self._death()

        answer = json.loads(line)
        if "error" in answer:
            raise SideError(answer["state"], answer["error"], answer["kind"])

        return answer["result"]

    def _death(self) -> SideError:
        code = self._process.wait()
        if self._stderr.closed:
            return SideError("failed", "it has been stopped")
        self._stderr.seek(0)
        last = [line.strip() for line in self._stderr if line.strip()][-1:]
        if code == -9:
            return SideError(
                "out of memory", "the system killed it, most likely for its memory"
            )
        return SideError("failed", f"it ended with {code}: {' '.join(last)}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._stderr.close()


# -- the child's end -----------------------------------------------------------------


class _Child:
    """What the child knows from one job to the next."""

    def __init__(self) -> None:
        self._runner: sides.Runner | None = None
        self._limit: Any = None
        self._meter: memory.Meter | None = None
        self._base = 0

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Load a side and run it once, so that all is allocated that stays."""
        made = Settings(**settings)
        sides.import_libraries(made.side)
        self._meter = _meter(made)
        before = 0 if self._meter is None else self._meter.now()
        self._runner = sides.make(made)

        noise = np.random.default_rng(0).standard_normal((1, _WARM_UP_FRAMES, 80))
        prepared = self._runner.prepare(noise.astype(np.float32))
        self._runner.run(prepared, None)
        del prepared
        gc.collect()

        loaded: dict[str, Any] = {"weights_bytes": None}
        if self._meter is not None:
            self._meter.reset()
            self._base = self._meter.now()
            loaded["weights_bytes"] = self._base - before
        if isinstance(self._runner, sides.PackageRunner):
            loaded["sizes"] = asdict(self._runner.sizes)

        return loaded

    def convert(self, settings: dict[str, Any]) -> None:
        sides.convert_for_ctranslate2(Settings(**settings))

    def load_limit(self, settings: dict[str, Any], sizes: dict[str, int]) -> None:
        import torch

        from seamless_w2vbert.benchmarking.limit import Limit, Sizes

        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self._limit = Limit(Sizes(**sizes), dtype, settings["device"])

    def limit(self, batch: int, frames: int) -> Any:
        return self._limit.measure(batch, frames)

    def run(
        self,
        fbanks: str,
        layer: int | None = None,
        watch_memory: bool = False,
        reference: str | None = None,
        save: str | None = None,
    ) -> dict[str, Any]:
        """Run the side. The clock starts with the input in the side's own form, and
        stops with the output there; of a short run that of a second one counts.

        :param watch_memory: give back unused memory first, so that the peak is that of
            this run. It is taken anew then, which costs time: not for timed runs.
        """
        assert self._runner is not None
        prepared = self._runner.prepare(np.load(fbanks))
        gc.collect()
        meter = self._meter if watch_memory else None
        if meter is not None:
            meter.reset()

        result, seconds = self._time(prepared, layer)
        if meter is None and seconds < SHORT:
            result, seconds = self._time(prepared, layer)

        answer: dict[str, Any] = {"seconds": seconds}
        if meter is not None:
            answer["peak_bytes"] = max(0, meter.peak() - self._base)
        if save is not None:
            np.save(save, self._runner.output(result))
        if reference is not None:
            expected = np.load(reference)[:, self._runner.frames]
            answer.update(_cosines(self._runner.output(result), expected))

        return answer

    def _time(self, prepared: Any, layer: int | None) -> tuple[Any, float]:
        assert self._runner is not None
        start = time.perf_counter()
        result = self._runner.run(prepared, layer)
        return result, time.perf_counter() - start

    def corpus(
        self, folder: str, audio_seconds: float, repeats: int, max_seconds: float
    ) -> dict[str, Any]:
        from seamless_w2vbert.benchmarking import corpus

        assert isinstance(self._runner, sides.PackageRunner)
        return corpus.measure(
            self._runner.pipeline, folder, audio_seconds, repeats, max_seconds
        ).to_json()


def _meter(settings: Settings) -> memory.Meter | None:
    if not settings.device.startswith("cuda"):
        return memory.HostMeter()

    if settings.side == "ctranslate2":
        return None  # its CUDA memory is not torch's to count

    import torch

    return memory.CudaMeter(torch, settings.device)


def _cosines(
    output: NDArray[np.float32], expected: NDArray[np.float32]
) -> dict[str, float]:
    # (N, S, M) -> (N, S)
    frames = min(output.shape[1], expected.shape[1])
    if frames < expected.shape[1]:
        raise RuntimeError(f"it gives {frames} frames, not {expected.shape[1]}")

    ours, theirs = output[:, :frames].astype(float), expected.astype(float)
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosines = (ours * theirs).sum(axis=-1) / norms

    return {"cosine": float(cosines.mean()), "cosine_worst": float(cosines.min())}


def _main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    # Where memory runs out, the system is to end a side and not the benchmark.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")

    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    child = _Child()

    while True:
        job = json.loads(jobs.get())
        answers.write(json.dumps(_answer(child, job.pop("do"), job)) + "\n")


def _read_jobs(jobs: queue.Queue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    # The parent has gone: nobody waits for what is being computed.
    os._exit(0)


def _answer(child: _Child, what: str, job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": getattr(child, what)(**job)}
    except Exception as ex:
        return {
            "error": _first_line(ex),
            "state": _state_of(ex),
            "kind": type(ex).__name__,
        }


def _state_of(ex: Exception) -> State:
    text = f"{type(ex).__name__} {ex}".lower()

    if isinstance(ex, MissingSideError):
        return "missing"
    # As torch, CUDA and C++ say it.
    memory = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
    if isinstance(ex, MemoryError) or any(words in text for words in memory):
        return "out of memory"
    return "failed"


def _first_line(ex: Exception) -> str:
    lines = [line.strip() for line in str(ex).splitlines() if line.strip()]
    text = lines[0] if lines else repr(ex)
    if not isinstance(ex, errors.SeamlessW2vBertError):
        text = f"{type(ex).__name__}: {text}"
    return text[:_MAX_REASON].rstrip(".")


if __name__ == "__main__":
    _main()
