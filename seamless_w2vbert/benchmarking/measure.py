"""Runs the sides in turn and collects what they take.

Comes in: the model, the inputs, the sides. Goes out: :class:`Benchmark`. In every
repeat each side runs each input once, so that whatever else the machine does meets all
of them; each side lives in a process of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seamless_w2vbert.audio import Waveform
from seamless_w2vbert.benchmarking import machine, peer_ctranslate2
from seamless_w2vbert.benchmarking.models import RANDOM_600M
from seamless_w2vbert.benchmarking.results import (
    DEFAULT_SIDES,
    EARLY_STOP,
    LIMIT,
    PACKAGE,
    SIDES,
    Benchmark,
    Case,
    CorpusRates,
    Measurement,
)
from seamless_w2vbert.benchmarking.sides import (
    MissingSideError,
    Settings,
    check_installed,
)
from seamless_w2vbert.benchmarking.worker import SideError, Worker
from seamless_w2vbert.constants import FBANK_STRIDE
from seamless_w2vbert.errors import ArgumentError
from seamless_w2vbert.fbank import fbank
from seamless_w2vbert.model import check_device
from seamless_w2vbert.synthetic import speech_like_noise

DEFAULT_CASES = tuple(map(Case.parse, ("1x5", "1x20", "4x10", "1x60")))

DTYPES = ("float32", "bfloat16", "float16")

_EARLY = 17 / 24
"""Layer 17 of 24 is the one that most users of W2v-BERT 2.0 take."""

_PAUSE = 0.25
"""Seconds between two sides: OpenMP threads go on spinning for 0.2 s after work."""

_LEAST_TIMEOUT = 1.0
"""No run is stopped sooner, in seconds."""

_NOTES = {
    "transformers": "Wav2Vec2BertModel with the same weights, its input features made "
    "beforehand and without a mask, since no input has padding.",
    "seamless": "seamless_communication's own modules with the same weights.",
    "fairseq2": "the modules that fairseq2 makes, without this package's attention.",
    "ctranslate2": peer_ctranslate2.NOTE,
    LIMIT: "the model's multiply-adds at the rate of the best matrix product that "
    "torch does at these sizes in this dtype.",
    EARLY_STOP: "only the layer that is named, and those below it.",
}


def benchmark(
    model: str = RANDOM_600M,
    *,
    num_layers: int | None = None,
    cases: Sequence[Case] = DEFAULT_CASES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    sides: Sequence[str] = DEFAULT_SIDES,
    repeats: int = 5,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    max_seconds: float = 300.0,
    corpus_seconds: float = 300.0,
    say: Callable[[str], None] = lambda line: None,
) -> Benchmark:
    """Measure this package and its peers side by side.

    :param model: ``random-600m``, or see :func:`load_conformer_shaw_model`.
    :param num_layers: keep only that many of its first layers; None for all.
    :param cases: the inputs.
    :param dtypes: what the package runs in, one group of sides each. CTranslate2 runs
        float32 beside float32, and int8 beside the others.
    :param sides: of :data:`SIDES`; the package itself always runs.
    :param repeats: timed runs of each side on each input, after one to warm up.
    :param threads: of each side; the cores of this process if None.
    :param max_seconds: the most that a side may take on one input in all its runs.
        Runs that would not fit are left out, a run that takes longer is stopped, and
        both are said.
    :param corpus_seconds: audio to run the stream over; 0 leaves the stream out.
    :param say: is told about progress.
    :raises ArgumentError: if an argument has a value that it cannot have.
    :raises SeamlessW2vBertError: if the package itself cannot load the model.
    """
    _check(cases, dtypes, sides, num_layers, repeats, max_seconds, corpus_seconds)
    threads = machine.num_cores() if threads is None else threads
    if threads < 1:
        raise ArgumentError(f"`threads` is {threads}; expected a count from 1 on.")

    with tempfile.TemporaryDirectory(prefix="seamless-w2vbert-bench-") as folder:
        settings = Settings(
            side=PACKAGE,
            dtype="float32",
            model=model,
            num_layers=num_layers,
            device=str(check_device(device)),
            threads=threads,
            folder=folder,
        )
        bench = _Bench(settings, repeats, max_seconds, say)
        bench.write_inputs(cases)
        bench.write_references()

        for dtype in dtypes:
            bench.run_group(dtype, sides, corpus_seconds)

    return Benchmark(
        model=model,
        num_layers=bench.sizes["num_layers"],
        early_layer=bench.early_layer,
        repeats=repeats,
        max_seconds=max_seconds,
        machine=machine.describe(torch.device(settings.device), threads),
        versions=machine.versions(),
        notes={side: note for side, note in _NOTES.items() if side in sides},
        measurements=tuple(track.result() for track in bench.tracks),
        corpus=tuple(bench.corpus),
        left_out=tuple(bench.left_out),
    )


def _check(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    sides: Sequence[str],
    num_layers: int | None,
    repeats: int,
    max_seconds: float,
    corpus_seconds: float,
) -> None:
    for name, values, known in (
        ("dtype", dtypes, DTYPES),
        ("side", sides, tuple(SIDES)),
    ):
        for value in values:
            if value not in known:
                raise ArgumentError(
                    f"There is no {name} {value!r}; expected {', '.join(known)}."
                )

    if not cases or not dtypes:
        raise ArgumentError("There is nothing to measure: no input, or no dtype.")

    for name, several in (("input", cases), ("dtype", dtypes), ("side", sides)):
        if len(set(several)) < len(several):
            raise ArgumentError(f"The same {name} is named twice.")

    for name, count in (("repeats", repeats), ("num_layers", num_layers)):
        if count is not None and count < 1:
            raise ArgumentError(f"`{name}` is {count}; expected a count from 1 on.")

    if not max_seconds > 0:
        raise ArgumentError(f"`max_seconds` is {max_seconds}; expected more than 0.")

    if not 0 <= corpus_seconds < float("inf"):
        raise ArgumentError(
            f"`corpus_seconds` is {corpus_seconds}; expected 0 or more."
        )


@dataclass
class _Track:
    """One side on one input, while it is being measured."""

    side: str
    dtype: str
    group: str
    case: Case
    weights_bytes: int | None = None
    warm_up: float | None = None
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0
    last: float = 0.0
    peak_bytes: int | None = None
    cosine: float | None = None
    cosine_worst: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    failure: SideError | None = None
    left_out: str = ""

    @property
    def name(self) -> str:
        return f"{self.case.label} {SIDES[self.side]} {self.dtype}"

    def result(self) -> Measurement:
        seconds = tuple(self.seconds) if self.failure is None else ()
        is_cold = False
        if not seconds and self.failure is None and self.warm_up is not None:
            seconds, is_cold = (self.warm_up,), True

        return Measurement(
            side=self.side,
            dtype=self.dtype,
            group=self.group,
            case=self.case,
            seconds=seconds,
            state=self.failure.state if self.failure else "ok",
            reason=self.failure.reason if self.failure else self.left_out,
            is_cold=is_cold,
            cosine=self.cosine,
            cosine_worst=self.cosine_worst,
            peak_bytes=self.peak_bytes,
            weights_bytes=self.weights_bytes,
            detail=self.detail,
        )


class _Bench:
    """What one benchmark keeps from step to step."""

    def __init__(
        self,
        settings: Settings,
        repeats: int,
        max_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._repeats = repeats
        self._max_seconds = max_seconds
        self._say = say
        self._folder = Path(settings.folder)
        self._frames: dict[Case, int] = {}
        self._has_reference: set[Case] = set()
        self._conversion: SideError | None = None
        self._is_converted = False
        self._started: _SideRun | None = None
        self.sizes: dict[str, int] = {}
        self.tracks: list[_Track] = []
        self.corpus: list[CorpusRates] = []
        self.left_out: list[str] = []

    @property
    def early_layer(self) -> int:
        """The counterpart of layer 17 of 24."""
        return max(1, round(_EARLY * self.sizes["num_layers"]))

    def _with(self, side: str, dtype: str) -> dict[str, Any]:
        return {**asdict(self._settings), "side": side, "dtype": dtype}

    # -- before any timing -----------------------------------------------------------

    def write_inputs(self, cases: Sequence[Case]) -> None:
        """Write the fbanks that all sides get."""
        for case in cases:
            fbanks = [
                fbank(
                    Waveform(torch.from_numpy(speech_like_noise(case.seconds, seed)))
                ).numpy()
                for seed in range(case.batch)
            ]
            np.save(self._input(case), np.stack(fbanks))
            self._frames[case] = len(fbanks[0]) // FBANK_STRIDE

    def write_references(self) -> None:
        """Write this package's float32 output on every input.

        :raises SeamlessW2vBertError: if it cannot load the model.
        """
        run = _SideRun(self, PACKAGE, "float32", "float32")
        if run.failure is not None:
            raise run.failure.as_package_error()

        self.sizes = run.loaded["sizes"]
        self._started = run

        for case in self._frames:
            self._say(f"{case.label} reference")
            try:
                run.ask(
                    "run",
                    max(_LEAST_TIMEOUT, self._max_seconds),
                    fbanks=self._input(case),
                    save=self._reference(case),
                )
                self._has_reference.add(case)
            except SideError as ex:
                self._say(f"{case.label} has no reference: {ex.state}: {ex.reason}")

    def _input(self, case: Case) -> str:
        return str(self._folder / f"{case.label}.input.npy")

    def _reference(self, case: Case) -> str:
        return str(self._folder / f"{case.label}.reference.npy")

    # -- a group of sides that take turns --------------------------------------------

    def run_group(
        self, dtype: str, sides: Sequence[str], corpus_seconds: float
    ) -> None:
        """Warm every side up, then run them in turn; last, the corpus."""
        with ExitStack() as stack:
            package = self._package(dtype)
            stack.callback(package.close)
            peers = [
                _SideRun(self, side, side_dtype, dtype)
                for side in sides
                if side not in (PACKAGE, EARLY_STOP)
                for side_dtype in self._dtypes_of(side, dtype)
            ]
            for peer in peers:
                stack.callback(peer.close)

            turns: list[tuple[_SideRun, _Track]] = []
            for case in self._frames:
                turns.append((package, self._track(package, PACKAGE, case)))
                if EARLY_STOP in sides:
                    turns.append((package, self._track(package, EARLY_STOP, case)))
                turns += [(peer, self._track(peer, peer.side, case)) for peer in peers]

            for repeat in range(-1, self._repeats):
                for run, track in turns:
                    self._take_turn(run, track, repeat)

            for peer in peers:
                peer.close()
            if corpus_seconds:
                self._run_corpus(package, corpus_seconds)

    def _package(self, dtype: str) -> _SideRun:
        """Start the package's side, or take the one that wrote the references."""
        started, self._started = self._started, None

        if started is not None and started.dtype == dtype:
            return started
        if started is not None:
            started.close()

        return _SideRun(self, PACKAGE, dtype, dtype)

    def _dtypes_of(self, side: str, dtype: str) -> list[str]:
        if side != "ctranslate2" or dtype == "float32":
            return [dtype]
        if self._settings.device == "cpu":
            return ["int8"]
        return [dtype, "int8"]

    def _track(self, run: _SideRun, side: str, case: Case) -> _Track:
        weights_bytes = run.loaded.get("weights_bytes")
        track = _Track(side, run.dtype, run.group, case, weights_bytes)
        track.failure = run.failure
        self.tracks.append(track)
        return track

    def _take_turn(self, run: _SideRun, track: _Track, repeat: int) -> None:
        """Run once, where there is time left for it."""
        if track.failure is not None or track.left_out:
            return

        if track.spent + track.last > self._max_seconds:
            track.left_out = (
                f"{repeat} of {self._repeats} runs fitted into {self._max_seconds:g} s"
            )
            self._say(f"{track.name}: {track.left_out}")
            return

        time.sleep(_PAUSE)
        start = time.perf_counter()
        try:
            answer = self._run_once(run, track, is_first=repeat < 0)
        except SideError as ex:
            if repeat >= 0 and ex.state == "too slow":
                # The runs before it were in time, and count.
                track.left_out = f"run {repeat + 1} was {ex.reason}"
            else:
                track.failure = ex
            self._say(f"{track.name}: {ex.state}: {ex.reason}")
            return

        track.last = time.perf_counter() - start
        track.spent += track.last

        if repeat < 0:
            track.warm_up = answer["seconds"]
            track.peak_bytes = answer.get("peak_bytes")
            track.cosine = answer.get("cosine")
            track.cosine_worst = answer.get("cosine_worst")
        else:
            track.seconds.append(answer["seconds"])
        if track.side == LIMIT:
            track.detail = {k: v for k, v in answer.items() if k != "seconds"}

        what = "warm-up" if repeat < 0 else f"{repeat + 1}/{self._repeats}"
        self._say(f"{track.name} {what}: {answer['seconds']:.3f} s")

    def _run_once(self, run: _SideRun, track: _Track, is_first: bool) -> Any:
        timeout = max(_LEAST_TIMEOUT, self._max_seconds - track.spent)
        case = track.case

        if track.side == LIMIT:
            frames = self._frames[case]
            return run.ask("limit", timeout, batch=case.batch, frames=frames)

        compare = is_first and track.side != EARLY_STOP and case in self._has_reference
        return run.ask(
            "run",
            timeout,
            fbanks=self._input(case),
            layer=self.early_layer if track.side == EARLY_STOP else None,
            watch_memory=is_first,
            reference=self._reference(case) if compare else None,
        )

    # -- CTranslate2's files ---------------------------------------------------------

    def _convert_for_ctranslate2(self) -> None:
        """Convert once for all groups.

        :raises SideError: if it cannot be done.
        """
        if not self._is_converted:
            self._is_converted = True
            self._say("CTranslate2: converting")
            worker = Worker(self._settings.threads)
            # Its converter works on the CPU; int8 is made from float32 on loading.
            settings = {**self._with("ctranslate2", "float32"), "device": "cpu"}
            try:
                worker.ask("convert", settings=settings)
            except SideError as ex:
                self._conversion = ex
            finally:
                worker.close()

        if self._conversion is not None:
            raise self._conversion

    def start(self, side: str, dtype: str) -> tuple[Worker, dict[str, Any]]:
        """Start a side's process and load the side.

        :raises SideError: if it cannot be had.
        """
        try:
            check_installed(side)
            if side == "ctranslate2":
                peer_ctranslate2.check_sizes(self.sizes)
        except MissingSideError as ex:
            raise SideError("missing", str(ex)) from None

        if side == "ctranslate2":
            self._convert_for_ctranslate2()

        self._say(f"loading {SIDES[side]}, {dtype}")
        worker = Worker(self._settings.threads)
        settings = self._with(side, dtype)
        try:
            if side == LIMIT:
                worker.ask("load_limit", settings=settings, sizes=self.sizes)
                return worker, {}
            return worker, worker.ask("load", settings=settings)
        except SideError:
            worker.close()
            raise

    # -- the corpus ------------------------------------------------------------------

    def _run_corpus(self, package: _SideRun, audio_seconds: float) -> None:
        self._say(f"corpus of {audio_seconds:g} s, {package.dtype}")
        try:
            answer = package.ask(
                "corpus",
                None,
                folder=self._settings.folder,
                audio_seconds=audio_seconds,
                repeats=self._repeats,
                max_seconds=self._max_seconds,
            )
        except SideError as ex:
            line = f"corpus, {package.dtype}: {ex.state}: {ex.reason}"
            self._say(line)
            self.left_out.append(line)
        else:
            self.corpus.append(CorpusRates.from_json(answer))


class _SideRun:
    """A side in its process, which is started again after it had to be stopped."""

    def __init__(self, bench: _Bench, side: str, dtype: str, group: str) -> None:
        self.side, self.dtype, self.group = side, dtype, group
        self.failure: SideError | None = None
        self.loaded: dict[str, Any] = {}
        self._bench = bench
        self._worker: Worker | None = None
        try:
            self._worker, self.loaded = bench.start(side, dtype)
        except SideError as ex:
            self.failure = ex

    def ask(self, what: str, timeout: float | None, **job: Any) -> Any:
        """Have a job done.

        :raises SideError: if it could not be, or not in time.
        """
        if self._worker is None:
            self._worker, _ = self._bench.start(self.side, self.dtype)
        try:
            return self._worker.ask(what, timeout, **job)
        except SideError:
            # Whatever state it is in now, the next input gets a fresh one.
            self.close()
            raise

    def close(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
