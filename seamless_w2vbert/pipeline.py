"""Audio -> hidden states: the five stages of the Seamless stack, in order.

Comes in: audio in any form, one list or an endless stream. Goes out:
:class:`EncoderOutput` for a list, :class:`StreamItem` for a stream. The stages are
plain attributes: call them alone, replace one, or put a step between two.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from seamless_w2vbert import audio, batch, encoder, fbank, precision, streaming
from seamless_w2vbert.acceleration import accelerate
from seamless_w2vbert.audio import AudioInput, Waveform
from seamless_w2vbert.batch import FbankBatch, HiddenBatch
from seamless_w2vbert.encoder import EncoderOutput, Layers
from seamless_w2vbert.errors import ArgumentError
from seamless_w2vbert.heads import CTCHead
from seamless_w2vbert.model import check_device, load_conformer_shaw_model
from seamless_w2vbert.streaming import StreamItem

_logger = logging.getLogger(__name__)

STAGES = ("decode", "fbank", "pad", "encoder_frontend", "encoder")
"""The stages in order; each is an attribute of :class:`SpeechEncoderPipeline`."""


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
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        accelerated: bool = True,
    ) -> SpeechEncoderPipeline:
        """Load a model and make its pipeline.

        :param model: see :func:`seamless_w2vbert.load_conformer_shaw_model`.
        :param dtype: what to compute in. ``"auto"`` takes the fastest on ``device``
            that keeps a mean cosine over 0.999 with float32 in every layer, which is
            measured with the model; the choice is logged.
        :param accelerated: see :func:`seamless_w2vbert.accelerate`; False for
            fairseq2's modules as they are.
        """
        device = check_device(device)

        def load(dtype: torch.dtype) -> Module:
            module = load_conformer_shaw_model(model, device=device, dtype=dtype)
            return accelerate(module) if accelerated else module

        if dtype != "auto":
            return cls(load(dtype))

        module, choice = precision.choose(load, device)
        _logger.info("%s: %s, %s", model, choice.dtype, choice.reason)

        return cls(module)

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

        fbanks = [self.fbank_of(item, sampling_rate)[0] for item in inputs]

        return self.encoder(self.encoder_frontend(self.pad(fbanks)), layers=layers)

    def fbank_of(
        self, item: AudioInput, sampling_rate: int | None = None
    ) -> tuple[Tensor, Waveform]:
        """Run the first two stages: (frames, 80), checked, and the waveform it is of.

        :raises AudioError: if the input has no embedding.
        """
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
        chunk: float | None = None,
        overlap: float = 0.0,
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
        :param chunk: where not None, embed recordings longer than this many seconds
            in chunks, each without the rest of the recording: an approximation.
        :param overlap: the seconds that chunks overlap by, for context; half of it is
            trimmed on each side of a seam, so that frames are as many as of the whole.
        :param on_error: ``"raise"`` the first error at its place in the stream, or
            ``"return"`` it as a :class:`StreamItem` with ``error`` set and go on.
        :raises AudioError: if an input has no embedding and ``on_error="raise"``.
        """
        if on_error not in ("raise", "return"):
            raise ArgumentError(f"`on_error` is {on_error!r}, not 'raise' or 'return'.")

        if streaming.is_one_input(inputs):
            raise ArgumentError("`inputs` is one input; pass a list of them.")

        run = streaming.Stream(
            self,
            layers=layers,
            sampling_rate=sampling_rate,
            max_frames=max_frames,
            max_items=max_items,
            num_workers=num_workers,
            chunk=chunk,
            overlap=overlap,
        )

        return run.items(inputs, raise_errors=on_error == "raise")
