"""Audio -> hidden states: the five stages of the Seamless stack, in order.

Comes in: audio in any form, one list or an endless stream. Goes out:
:class:`EncoderOutput` for a list, :class:`StreamItem` for a stream. The stages are
plain attributes: call them alone, replace one, or put a step between two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from seamless_w2vbert import audio, batch, encoder, fbank, stack
from seamless_w2vbert.audio import AudioInput, Waveform
from seamless_w2vbert.batch import FbankBatch, HiddenBatch
from seamless_w2vbert.encoder import EncoderOutput, Layers
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError
from seamless_w2vbert.heads import CTCHead
from seamless_w2vbert.model import load_conformer_shaw_model

STAGES = ("decode", "fbank", "pad", "encoder_frontend", "encoder")
"""The stages in order; each is an attribute of :class:`SpeechEncoderPipeline`."""

DEFAULT_MAX_FRAMES = {"cpu": 6_000, "cuda": 48_000}
"""The padded fbank frames (10 ms) in one batch of a stream, by device: a minute of
audio keeps two cores busy, eight minutes a GPU."""

UNKNOWN_FRAMES = 3_000
"""What a stream reckons with where a header does not tell the length: 30 s."""

MIN_WINDOW = 144_000
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


class SpeechEncoderPipeline:
    """Runs a speech encoder as the Seamless stack does: decode, fbank, pad,
    encoder_frontend, encoder.

    Each stage is a public attribute that can be called alone or assigned anew:

    - ``decode(audio) -> Waveform``, mono float32 at 16 kHz
    - ``fbank(waveform) -> (frames, 80)`` float32
    - ``pad(fbanks) -> FbankBatch``, (N, frames, 80)
    - ``encoder_frontend(batch) -> HiddenBatch``, (N, S, model_dim)
    - ``encoder(hidden, layers=None) -> EncoderOutput``
    """

    decode: Callable[..., Waveform]
    fbank: Callable[[Waveform], Tensor]
    pad: Callable[[Sequence[Tensor]], FbankBatch]
    encoder_frontend: Callable[[FbankBatch], HiddenBatch]
    encoder: Callable[..., EncoderOutput]
    logits: Callable[[EncoderOutput], Tensor]
    """A sixth stage, for models with a CTC head: (N, S, vocabulary)."""

    def __init__(self, module: Module) -> None:
        """
        :param module:
            Any model with an ``encoder_frontend`` and an ``encoder``, or UnitY's
            ``speech_encoder_frontend`` and ``speech_encoder``. It is set to
            evaluation mode; its device and dtype are the pipeline's.
        :raises ArgumentError: if it has no such parts.
        """
        if not isinstance(module, Module):
            raise ArgumentError(
                f"{module!r} is no module; for a name or path use from_pretrained()."
            )

        self.module = module.eval()
        self._frontend = encoder.frontend_of(module)
        self._encoder = encoder.encoder_of(module)

        self.decode = audio.decode
        self.fbank = fbank.fbank
        self.pad = batch.pad
        self.encoder_frontend = self._run_frontend
        self.encoder = self._run_encoder
        self.logits = self._run_ctc_head

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SpeechEncoderPipeline:
        """Load a model and make its pipeline.

        :param model: see :func:`seamless_w2vbert.load_conformer_shaw_model`.
        """
        return cls(load_conformer_shaw_model(model, device=device, dtype=dtype))

    @property
    def device(self) -> torch.device:
        """Where the encoder's parameters are."""
        return next(self._encoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder's parameters."""
        return next(self._encoder.parameters()).dtype

    @property
    def num_layers(self) -> int:
        """The number of the last layer."""
        return encoder.num_layers_of(self._encoder)

    def insert_after(self, stage: str, step: Callable[[Any], Any]) -> None:
        """Put ``step`` behind ``stage``: it gets the stage's result and returns what
        the next stage is to see.

        :raises ArgumentError: if there is no such stage.
        """
        if stage not in (*STAGES, "logits"):
            raise ArgumentError(
                f"There is no stage {stage!r}; the stages are {', '.join(STAGES)}."
            )

        before = getattr(self, stage)

        def extended(*args: Any, **kwargs: Any) -> Any:
            return step(before(*args, **kwargs))

        setattr(self, stage, extended)

    @torch.inference_mode()
    def _run_frontend(self, fbanks: FbankBatch) -> HiddenBatch:
        """Move the batch to the model's device and dtype, and apply its frontend."""
        return encoder.run_frontend(self._frontend, fbanks.to(self.device, self.dtype))

    @torch.inference_mode()
    def _run_encoder(self, hidden: HiddenBatch, layers: Layers = None) -> EncoderOutput:
        """Apply the encoder up to the highest of ``layers``."""
        return encoder.run_encoder(self._encoder, hidden, layers)

    @torch.inference_mode()
    def _run_ctc_head(self, output: EncoderOutput) -> Tensor:
        """Apply the CTC head, as ``Wav2Vec2BertForCTC`` does.

        :returns: (N, S, vocabulary), zeros on padding.
        :raises ArgumentError: if the model has no CTC head.
        """
        return encoder.zero_padding(
            self._ctc_head()(output.last_hidden_state), output.lengths
        )

    def _ctc_head(self) -> CTCHead:
        head = getattr(self.module, "ctc_head", None)
        if isinstance(head, CTCHead):
            return head

        raise ArgumentError(
            "This model has no CTC head; load a folder that Wav2Vec2BertForCTC saved."
        )

    def transcribe(
        self,
        inputs: AudioInput | Sequence[AudioInput],
        *,
        sampling_rate: int | None = None,
    ) -> list[str]:
        """Run a fine-tuned model over ``inputs`` and decode greedily to text.

        :raises ArgumentError: if the model has no CTC head or its folder no tokenizer.
        :raises AudioError: if an input has no embedding.
        """
        head = self._ctc_head()
        output = self(inputs, sampling_rate=sampling_rate)
        tokens = self.logits(output).argmax(dim=-1)
        lengths = output.lengths.tolist()

        return head.decode(
            [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        )

    # -- one list --------------------------------------------------------------------

    def __call__(
        self,
        inputs: AudioInput | Sequence[AudioInput],
        *,
        layers: Layers = None,
        sampling_rate: int | None = None,
    ) -> EncoderOutput:
        """Run all five stages over ``inputs`` as one padded batch.

        :param inputs: audio in any form that ``decode`` takes, one or a list.
        :param layers: layer numbers as in Transformers' ``hidden_states``; None for
            the encoder's output alone.
        :param sampling_rate: the rate of arrays and tensors in Hz; 16,000 if None.
        :raises AudioError: if an input has no embedding.
        """
        if not isinstance(inputs, (list, tuple)):
            inputs = [inputs]  # type: ignore[list-item]

        fbanks = [self._fbank_of(item, sampling_rate)[0] for item in inputs]

        return self.encoder(self.encoder_frontend(self.pad(fbanks)), layers=layers)

    def _fbank_of(
        self, item: AudioInput, sampling_rate: int | None
    ) -> tuple[Tensor, Waveform]:
        # The rate is that of arrays; a list may hold files beside them.
        if sampling_rate is None or not audio.is_array(item):
            waveform = self.decode(item)
        else:
            waveform = self.decode(item, sampling_rate=sampling_rate)

        name = getattr(waveform, "source", audio.name_of(item))

        return batch.check_fbank(self.fbank(waveform), name), waveform

    # -- a stream --------------------------------------------------------------------

    def stream(
        self,
        inputs: Iterable[AudioInput | tuple[str, AudioInput]],
        *,
        layers: Layers = None,
        sampling_rate: int | None = None,
        max_frames: int | None = None,
        max_items: int = 64,
        num_workers: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Iterator[StreamItem]:
        """Embed a corpus of any size, in the order it comes in.

        Built on fairseq2's ``DataPipeline``: lengths are read from headers, so that
        utterances of like length share a batch; decoding and fbanks run in threads
        ahead of the encoder. Memory does not grow with the corpus: never more than a
        few batches are in flight, and results wait only for the window of 24
        minutes (or eight batches) that they were sorted in.

        :param inputs: audio in any form that ``decode`` takes, or (id, audio) pairs.
            Read lazily.
        :param layers: layer numbers; None for the encoder's output alone.
        :param sampling_rate: the rate of arrays and tensors in Hz; 16,000 if None.
        :param max_frames: the most fbank frames (10 ms) in a batch, padding included.
            A longer utterance has a batch of its own.
        :param max_items: the most utterances in a batch.
        :param num_workers: batches that are prepared at a time; the number of cores,
            at most 4, if None.
        :param on_error: ``"raise"`` the first error at its place in the stream, or
            ``"return"`` it as a :class:`StreamItem` with ``error`` set and go on.
        :raises AudioError: if an input has no embedding and ``on_error="raise"``.
        """
        if on_error not in ("raise", "return"):
            raise ArgumentError(f"`on_error` is {on_error!r}, not 'raise' or 'return'.")

        if _is_one_input(inputs):
            raise ArgumentError("`inputs` is one input; pass a list of them.")

        if layers is not None:
            layers = encoder.resolve_layers(layers, self.num_layers)

        if max_frames is None:
            max_frames = DEFAULT_MAX_FRAMES[
                "cpu" if self.device.type == "cpu" else "cuda"
            ]

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

        return _Stream(self, layers, sampling_rate).run(
            inputs, max_frames, max_items, num_workers, on_error
        )


def _is_one_input(inputs: Any) -> bool:
    one = (str, bytes, bytearray, memoryview, os.PathLike, Waveform)

    return (
        isinstance(inputs, one)
        or hasattr(inputs, "read")
        or not isinstance(inputs, Iterable)
        or (isinstance(inputs, (np.ndarray, Tensor)) and inputs.ndim < 2)
    )


@dataclass
class _Utterance:
    """An input on its way through the stream."""

    index: int
    id: str
    audio: AudioInput
    error: SeamlessW2vBertError | None = None
    samples: int = 0
    fbank: Tensor | None = None


@dataclass
class _Load:
    """A batch to prepare, and the utterances that end with it in input order."""

    utterances: list[_Utterance]
    fbanks: FbankBatch | None = None
    is_last_of_window: bool = False
    failure: BaseException | None = None


class _Stream:
    """One run of :meth:`SpeechEncoderPipeline.stream`."""

    def __init__(
        self,
        pipeline: SpeechEncoderPipeline,
        layers: Layers,
        sampling_rate: int | None,
    ) -> None:
        self._pipeline = pipeline
        self._layers = layers
        self._sampling_rate = sampling_rate

    def run(
        self,
        inputs: Iterable[Any],
        max_frames: int,
        max_items: int,
        num_workers: int,
        on_error: str,
    ) -> Iterator[StreamItem]:
        loads = self._plan(inputs, max_frames, max_items)

        builder = stack.load().DataPipeline.count().map(lambda _: _next(loads))
        builder = builder.map(self._prepare, num_parallel_calls=num_workers)
        reader = builder.prefetch(num_workers).and_return()

        window: list[StreamItem] = []

        for load in reader:
            if load is None:  # the end of the inputs
                break

            if load.failure is not None:
                raise load.failure

            window.extend(self._embed(load))

            if load.is_last_of_window:
                for item in sorted(window, key=lambda item: item.index):
                    if item.error is not None and on_error == "raise":
                        raise item.error
                    yield item
                window = []

    def _plan(
        self, inputs: Iterable[Any], max_frames: int, max_items: int
    ) -> Iterator[_Load]:
        windows = batch.plan_batches(
            self._measure(inputs),
            max_frames=max_frames,
            max_items=max_items,
            window=max(8 * max_frames, MIN_WINDOW),
        )

        for batches in windows:
            for position, utterances in enumerate(batches, start=1):
                last = position == len(batches)
                yield _Load(utterances, is_last_of_window=last)

    def _measure(self, inputs: Iterable[Any]) -> Iterator[tuple[_Utterance, int]]:
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
                info = audio.inspect(
                    utterance.audio, sampling_rate=self._rate(utterance)
                )
                frames = fbank.num_frames(info.samples)
            except SeamlessW2vBertError:
                # Whether it is audio after all is for the decoder to say.
                frames = UNKNOWN_FRAMES

            yield utterance, frames

    def _rate(self, utterance: _Utterance) -> int | None:
        return self._sampling_rate if audio.is_array(utterance.audio) else None

    def _prepare(self, load: _Load | None) -> _Load | None:
        """Decode, compute fbanks and pad: what the worker threads do."""
        if load is None or load.failure is not None:
            return load

        pipeline = self._pipeline

        try:
            for utterance in load.utterances:
                try:
                    utterance.fbank, waveform = pipeline._fbank_of(
                        utterance.audio, self._sampling_rate
                    )
                    utterance.samples = len(waveform.samples)
                except SeamlessW2vBertError as ex:
                    utterance.error = ex

            fbanks = [u.fbank for u in load.utterances if u.fbank is not None]
            if fbanks:
                load.fbanks = pipeline.pad(fbanks)
                if not isinstance(load.fbanks, FbankBatch):
                    raise ArgumentError(
                        f"The stage `pad` returned {type(load.fbanks).__name__}, not "
                        "FbankBatch."
                    )
        except BaseException as ex:  # a replaced stage failed: raise it in the caller
            load.failure = ex

        return load

    def _embed(self, load: _Load) -> Iterator[StreamItem]:
        """Run the encoder: what the caller's thread does."""
        states: Iterator[tuple[dict[int, Tensor], Tensor | None]] = iter(())

        if load.fbanks is not None:
            hidden = self._pipeline.encoder_frontend(load.fbanks)
            states = _split(self._pipeline.encoder(hidden, layers=self._layers))

        for utterance in load.utterances:
            hidden_states, last = ({}, None) if utterance.error else next(states)
            yield StreamItem(
                id=utterance.id,
                index=utterance.index,
                hidden_states=hidden_states,
                last_hidden_state=last,
                samples=utterance.samples,
                error=utterance.error,
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
