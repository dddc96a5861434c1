"""A corpus -> its hidden states, utterance by utterance, the encoder kept busy.

Comes in: endless audio, or groups of it. Goes out: :class:`StreamItem` in the order of
the input. Lengths are read ahead, so that utterances of like length share a batch;
decoding and fbanks run in threads ahead of the encoder, on fairseq2's ``DataPipeline``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from seamless_w2vbert import audio, batch, encoder, fbank, stack
from seamless_w2vbert.audio import AudioInput, Waveform
from seamless_w2vbert.batch import FbankBatch
from seamless_w2vbert.constants import FBANK_STRIDE, FRAMES_PER_SECOND
from seamless_w2vbert.encoder import EncoderOutput, Layers
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError

if TYPE_CHECKING:
    from seamless_w2vbert.pipeline import SpeechEncoderPipeline

T = TypeVar("T")

DEFAULT_MAX_FRAMES = {"cpu": 6_000, "cuda": 48_000}
"""The padded fbank frames (10 ms) in one batch of a stream, by device: a minute of
audio keeps two cores busy, eight minutes a GPU."""

UNKNOWN_FRAMES = 3_000
"""What a stream reckons with where a header does not tell the length: 30 s."""

_MIN_WINDOW = 144_000
"""The fbank frames (24 minutes of audio) that a stream sorts by length at a time."""


@dataclass(frozen=True)
class StreamItem:
    """One utterance out of :meth:`SpeechEncoderPipeline.stream`."""

    id: str
    """The id that came with it, else its path, else its position in the stream."""

    index: int
    """Its position in the stream, from 0."""

    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    """The layers asked for, unpadded, on the CPU. *Shape:* (frames, model_dim)."""

    last_hidden_state: Tensor | None = None
    """The encoder's output, if it was computed, likewise."""

    samples: int = 0
    """The length of its waveform at 16 kHz."""

    error: SeamlessW2vBertError | None = None
    """What was wrong with it; None for an utterance that was embedded."""


def window_of(max_frames: int) -> int:
    """Return how many fbank frames a stream with such batches sorts by length at a
    time: on CPU 24 minutes of audio, on a GPU an hour."""
    return max(8 * max_frames, _MIN_WINDOW)


def is_one_input(inputs: Any) -> bool:
    """Tell whether ``inputs`` is audio itself, where several are expected."""
    one = (str, bytes, bytearray, memoryview, os.PathLike, Waveform)

    return (
        isinstance(inputs, one)
        or hasattr(inputs, "read")
        or not isinstance(inputs, Iterable)
        or (isinstance(inputs, (np.ndarray, Tensor)) and inputs.ndim < 2)
    )


def measure(given: AudioInput, sampling_rate: int | None = None) -> int:
    """Return how many fbank frames (10 ms) an input will have, from its header; a guess
    where that cannot be read. Whether it is audio at all is for the decoder to say."""
    try:
        rate = sampling_rate if audio.is_array(given) else None
        return fbank.num_frames(audio.inspect(given, sampling_rate=rate).samples)
    except SeamlessW2vBertError:
        return UNKNOWN_FRAMES


@dataclass
class _Utterance:
    """An input on its way through the stream."""

    index: int
    id: str
    audio: AudioInput
    error: SeamlessW2vBertError | None = None
    samples: int = 0
    pieces: list[_Piece] = field(default_factory=list)


@dataclass
class _Piece:
    """What of an utterance is encoded in one row of a batch: all of it, or a chunk."""

    fbank: Tensor
    keep: slice
    """The frames of its output that are part of the utterance's."""

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    last_hidden_state: Tensor | None = None
    error: SeamlessW2vBertError | None = None


@dataclass
class _Load:
    """Utterances to prepare together."""

    utterances: list[_Utterance]
    batches: list[tuple[list[_Piece], FbankBatch]] = field(default_factory=list)
    is_last_of_group: bool = False
    failure: BaseException | None = None


class Stream:
    """A way to embed many utterances with a pipeline; runs any number of times."""

    def __init__(
        self,
        pipeline: SpeechEncoderPipeline,
        *,
        layers: Layers = None,
        sampling_rate: int | None = None,
        max_frames: int | None = None,
        max_items: int = 64,
        num_workers: int | None = None,
        chunk: float | None = None,
        overlap: float = 0.0,
    ) -> None:
        """The parameters are those of :meth:`SpeechEncoderPipeline.stream`.

        :raises ArgumentError: if one of them makes no sense.
        """
        if layers is not None:
            layers = encoder.resolve_layers(layers, pipeline.num_layers)

        if max_frames is None:
            is_cpu = pipeline.device.type == "cpu"
            max_frames = DEFAULT_MAX_FRAMES["cpu" if is_cpu else "cuda"]

        if num_workers is None:
            num_workers = min(4, os.cpu_count() or 1)

        for name, value in (
            ("max_frames", max_frames),
            ("max_items", max_items),
            ("num_workers", num_workers),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(
                    f"`{name}` is {value!r}; expected a count from 1 on."
                )

        self._pipeline = pipeline
        self._layers = layers
        self._sampling_rate = sampling_rate
        self._max_frames = max_frames
        self._max_items = max_items
        self._num_workers = num_workers
        self._chunk = chunk_frames(chunk, overlap)

        if chunk is not None and not pipeline.num_layers:
            raise ArgumentError("Only an encoder with layers can be run in chunks.")

    # -- what goes in and out --------------------------------------------------------

    def items(
        self, inputs: Iterable[Any], *, raise_errors: bool
    ) -> Iterator[StreamItem]:
        """Embed ``inputs``, which are read lazily, in windows sorted by length."""
        windows = batch.split_windows(
            self._utterances(inputs),
            window=window_of(self._max_frames),
            max_items=self._max_items,
        )

        for window in self._run(windows, lambda item: item):
            window.reverse()
            while window:  # what was given is not held while the next is computed
                item = window.pop()
                if item.error is not None and raise_errors:
                    raise item.error
                yield item

    def groups(
        self,
        groups: Iterable[Sequence[tuple[str, AudioInput, int]]],
        finish: Callable[[StreamItem], T],
    ) -> Iterator[list[T]]:
        """Embed groups of utterances, of which no batch crosses the border.

        What an utterance's embedding is, to the last bit, then depends on its group
        alone, whatever came before, unless a batch did not fit a GPU's memory.

        :param groups: of (id, audio, length in fbank frames), see :func:`measure`.
            Read lazily.
        :param finish: what to make of an item as soon as its batch is done. Items with
            ``error`` set are given too. Called in the caller's thread.
        :returns: for each group the results, in the order of its utterances.
        """
        index = 0

        def measured() -> Iterator[list[tuple[_Utterance, int]]]:
            nonlocal index
            for group in groups:
                start, index = index, index + len(group)
                yield [
                    (_Utterance(start + n, name, given), frames)
                    for n, (name, given, frames) in enumerate(group)
                ]

        return self._run(measured(), finish)

    def _utterances(self, inputs: Iterable[Any]) -> Iterator[tuple[_Utterance, int]]:
        for index, given in enumerate(inputs):
            if isinstance(given, tuple):
                if len(given) != 2:
                    raise ArgumentError(
                        f"Input {index} is a tuple of {len(given)}, not (id, audio)."
                    )
                utterance = _Utterance(index, str(given[0]), given[1])
            else:
                name = audio.name_of(given)
                is_path = isinstance(given, (str, os.PathLike))
                utterance = _Utterance(index, name if is_path else str(index), given)

            try:
                utterance.audio = audio.rereadable(utterance.audio)
            except SeamlessW2vBertError as ex:
                utterance.error = ex

            yield utterance, measure(utterance.audio, self._sampling_rate)

    # -- the run ---------------------------------------------------------------------

    def _run(
        self,
        groups: Iterable[list[tuple[_Utterance, int]]],
        finish: Callable[[StreamItem], T],
    ) -> Iterator[list[T]]:
        loads = self._plan(groups)

        builder = stack.load().DataPipeline.count().map(lambda _: _next(loads))
        builder = builder.map(self._prepare, num_parallel_calls=self._num_workers)
        reader = builder.prefetch(self._num_workers).and_return()

        results: list[tuple[int, T]] = []

        for load in reader:
            if load is None:  # the end of the inputs
                break

            if load.failure is not None:
                raise load.failure

            for pieces, fbanks in load.batches:
                self._embed(pieces, fbanks)

            for utterance in load.utterances:
                results.append((utterance.index, finish(_join(utterance))))

            if load.is_last_of_group:
                results.sort(key=lambda pair: pair[0])
                group, results = [result for _, result in results], []
                yield group
                del group

    def _plan(self, groups: Iterable[list[tuple[_Utterance, int]]]) -> Iterator[_Load]:
        for group in groups:
            batches = batch.cut_batches(
                group, max_frames=self._max_frames, max_items=self._max_items
            )
            for position, utterances in enumerate(batches, start=1):
                last = position == len(batches)
                yield _Load(utterances, is_last_of_group=last)

    def _prepare(self, load: _Load | None) -> _Load | None:
        """Decode, compute fbanks and pad: what the worker threads do."""
        if load is None or load.failure is not None:
            return load

        pipeline = self._pipeline

        try:
            for utterance in load.utterances:
                if utterance.error is not None:
                    continue
                try:
                    fbanks, waveform = pipeline.fbank_of(
                        utterance.audio, self._sampling_rate
                    )
                    utterance.samples = len(waveform.samples)
                    utterance.pieces = self._pieces(fbanks)
                except SeamlessW2vBertError as ex:
                    utterance.error = ex

            # Cut once more: chunks are many, and headers can be wrong.
            for pieces in batch.cut_batches(
                (
                    (piece, len(piece.fbank))
                    for utterance in load.utterances
                    for piece in utterance.pieces
                ),
                max_frames=self._max_frames,
                max_items=self._max_items,
            ):
                padded = pipeline.pad([piece.fbank for piece in pieces])
                if not isinstance(padded, FbankBatch):
                    raise ArgumentError(
                        f"The stage `pad` returned {type(padded).__name__}, not "
                        "FbankBatch."
                    )
                load.batches.append((pieces, padded))
        except BaseException as ex:  # a replaced stage failed: raise it in the caller
            load.failure = ex

        return load

    def _pieces(self, fbanks: Tensor) -> list[_Piece]:
        frames = len(fbanks) // FBANK_STRIDE

        if self._chunk is None or frames <= self._chunk[0]:
            return [_Piece(fbanks, slice(0, frames))]

        return [
            _Piece(fbanks[FBANK_STRIDE * start : FBANK_STRIDE * stop], keep)
            for start, stop, keep in cut_chunks(frames, *self._chunk)
        ]

    def _embed(self, pieces: list[_Piece], fbanks: FbankBatch) -> None:
        """Run the encoder: what the caller's thread does."""
        pipeline = self._pipeline

        try:
            hidden = pipeline.encoder_frontend(fbanks)
            states = _split(pipeline.encoder(hidden, layers=self._layers))
        except torch.cuda.OutOfMemoryError as ex:
            torch.cuda.empty_cache()
            # What is prepared from now on is cut to what does fit.
            size = fbanks.seqs.size(0) * fbanks.seqs.size(1)
            self._max_frames = max(1, min(self._max_frames, size // 2))
            reason = SeamlessW2vBertError(
                f"{len(fbanks.seqs[0])} fbank frames do not fit in the memory of the "
                f"device; embed it in chunks. ({str(ex).splitlines()[0]})"
            )
        except SeamlessW2vBertError as ex:
            reason = ex
        else:
            for piece, (hidden_states, last) in zip(pieces, states, strict=True):
                piece.hidden_states, piece.last_hidden_state = hidden_states, last
            return

        if len(pieces) == 1:
            pieces[0].error = reason
            return

        # Smaller batches may fit, and one utterance must not take the others with it.
        half = len(pieces) // 2
        for rows in (slice(0, half), slice(half, None)):
            lengths = fbanks.lengths[rows]
            self._embed(
                pieces[rows],
                FbankBatch(fbanks.seqs[rows, : int(lengths.max())], lengths),
            )


def _next(loads: Iterator[_Load]) -> _Load | None:
    try:
        return next(loads, None)
    except BaseException as ex:  # the caller's iterable failed: raise it in the caller
        return _Load([], failure=ex)


def _split(output: EncoderOutput) -> Iterator[tuple[dict[int, Tensor], Tensor | None]]:
    """Unpad a batch; copies, so that no item keeps the whole batch alive."""
    hidden = {number: seqs.cpu() for number, seqs in output.hidden_states.items()}
    final = None if output.final is None else output.final[0].cpu()

    for row, length in enumerate(output.hidden_lengths.tolist()):
        states = {number: seqs[row, :length].clone() for number, seqs in hidden.items()}
        last = None
        if final is not None:
            last = final[row, : int(output.lengths[row])].clone()
        yield states, last


def _join(utterance: _Utterance) -> StreamItem:
    pieces, utterance.pieces = utterance.pieces, []
    error = utterance.error
    for piece in pieces:
        if error is None and piece.error is not None:
            error = SeamlessW2vBertError(f"{utterance.id}: {piece.error}")
    hidden_states: dict[int, Tensor] = {}
    last = None

    if error is None and len(pieces) == 1:
        hidden_states = pieces[0].hidden_states
        last = pieces[0].last_hidden_state
    elif error is None:
        for number in pieces[0].hidden_states:
            hidden_states[number] = torch.cat(
                [piece.hidden_states[number][piece.keep] for piece in pieces]
            )
        if pieces[0].last_hidden_state is not None:
            last = torch.cat(
                [
                    piece.last_hidden_state[piece.keep]
                    for piece in pieces
                    if piece.last_hidden_state is not None
                ]
            )

    return StreamItem(
        id=utterance.id,
        index=utterance.index,
        hidden_states=hidden_states,
        last_hidden_state=last,
        samples=utterance.samples,
        error=error,
    )


# -- chunks --------------------------------------------------------------------------


def chunk_frames(chunk: float | None, overlap: float) -> tuple[int, int] | None:
    """Return the length and the overlap of chunks in frames of 20 ms.

    :param chunk: in seconds; None for none.
    :param overlap: in seconds.
    :raises ArgumentError: if the one is not longer than the other.
    """
    if chunk is None:
        if overlap:
            raise ArgumentError("`overlap` is of chunks; give `chunk` too.")
        return None

    try:
        frames = round(float(chunk) * FRAMES_PER_SECOND)
        shared = round(float(overlap) * FRAMES_PER_SECOND)
    except (TypeError, ValueError, OverflowError):
        frames, shared = 0, 0

    if not 0 <= shared < frames:
        raise ArgumentError(
            f"Chunks of {chunk!r} s that overlap by {overlap!r} s make no sense; "
            "expected, for example, 30 and 4."
        )

    return frames, shared


def cut_chunks(
    frames: int, chunk: int, overlap: int
) -> Iterator[tuple[int, int, slice]]:
    """Cut a recording longer than a chunk into chunks.

    Every chunk is of full length: the last starts earlier rather than being short, so
    that its frames have context too.

    :param frames: the encoder frames of the recording.
    :returns: first and last + 1 frame of each chunk, and which of its frames to keep;
        those kept follow each other without gap.
    """
    kept = 0
    start = 0

    while True:
        stop = start + chunk
        until = stop - (overlap - overlap // 2) if stop < frames else frames
        yield start, stop, slice(kept - start, until - start)

        if stop >= frames:
            return

        kept = until
        start = min(start + chunk - overlap, frames - chunk)
