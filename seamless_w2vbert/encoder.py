"""FbankBatch -> hidden states: frontend, Conformer blocks, the layers asked for.

Comes in: a module with an ``encoder_frontend`` and an ``encoder``, and a batch. Goes
out: :class:`EncoderOutput`. Nothing above the highest layer asked for is computed.

Layers are numbered as Transformers numbers ``hidden_states``: 0 is the frontend's
output, k the output of block k. So layer 17 is the output of block 17, the 18th entry.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from seamless_w2vbert import stack
from seamless_w2vbert.batch import FbankBatch, HiddenBatch
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError

Layers: TypeAlias = int | Iterable[int] | None
"""Layer numbers; None is the encoder's own output alone."""


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder made of a batch. Padding is zeros everywhere."""

    hidden_states: Mapping[int, Tensor]
    """The layers asked for, by number (negative ones resolved), each of shape
    (N, S, model_dim) in the dtype of the model."""

    hidden_lengths: Tensor
    """The valid frames in ``hidden_states``. *Shape:* (N,), int64, on the CPU."""

    final: tuple[Tensor, Tensor] | None
    """The encoder's own output and its lengths, if it was computed."""

    @property
    def last_hidden_state(self) -> Tensor:
        """The encoder's output. *Shape:* (N, S, model_dim).

        :raises ArgumentError: if only lower layers were asked for.
        """
        if self.final is None:
            raise ArgumentError(
                "The last hidden state was not computed, since only layers "
                f"{sorted(self.hidden_states)} were asked for; add -1 to `layers`."
            )
        return self.final[0]

    @property
    def lengths(self) -> Tensor:
        """The valid frames of ``last_hidden_state``, or of ``hidden_states`` where
        that was not computed. They differ only for encoders with an adaptor that
        shortens its input, as UnitY's. *Shape:* (N,), int64, on the CPU."""
        return self.hidden_lengths if self.final is None else self.final[1]


def frontend_of(module: Module) -> Module:
    """Return ``encoder_frontend``, or UnitY's ``speech_encoder_frontend``."""
    return _part_of(module, "encoder_frontend", "speech_encoder_frontend")


def encoder_of(module: Module) -> Module:
    """Return ``encoder``, or UnitY's ``speech_encoder``."""
    return _part_of(module, "encoder", "speech_encoder")


def _part_of(module: Module, *names: str) -> Module:
    # A UnitY model has both a speech and a text encoder: the speech one is meant.
    for name in reversed(names):
        part = getattr(module, name, None)
        if isinstance(part, Module):
            return part

    raise ArgumentError(
        f"{type(module).__name__} has neither {names[0]!r} nor {names[1]!r}; pass a "
        "model such as load_conformer_shaw_model() returns."
    )


def num_layers_of(encoder: Module) -> int:
    """Return how many layers :func:`run_encoder` can tell apart, 0 if it cannot."""
    layered = _layered(encoder)
    return 0 if layered is None else len(layered.layers)  # type: ignore[arg-type]


def _layered(encoder: Module) -> Module | None:
    """Return the encoder that holds the blocks: itself, or what an adaptor wraps."""
    for candidate in (encoder, getattr(encoder, "inner", None)):
        if isinstance(candidate, Module) and hasattr(candidate, "layers"):
            return candidate

    return None


def resolve_layers(layers: Iterable[int] | int, num_layers: int) -> tuple[int, ...]:
    """Turn layer numbers into sorted ones between 0 and ``num_layers``.

    :raises ArgumentError: if a number is out of range, or none is given.
    """
    try:
        several: Iterable[Any] = (operator.index(layers),)  # type: ignore[arg-type]
    except TypeError:
        plain = isinstance(layers, Iterable) and not isinstance(layers, (str, bytes))
        several = layers if plain else (layers,)  # type: ignore[assignment]

    resolved = set()

    for given in several:
        try:
            if isinstance(given, bool):
                raise TypeError
            layer = operator.index(given)
        except TypeError:
            raise ArgumentError(f"Layer {given!r} is not a whole number.") from None
        if not -num_layers - 1 <= layer <= num_layers:
            raise ArgumentError(
                f"Layer {layer} does not exist: this encoder has layers 0 (the "
                f"frontend's output) to {num_layers} (the output of the last block)."
            )
        resolved.add(layer + num_layers + 1 if layer < 0 else layer)

    if not resolved:
        raise ArgumentError("`layers` is empty; leave it out for the last one.")

    return tuple(sorted(resolved))


def run_frontend(frontend: Module, batch: FbankBatch) -> HiddenBatch:
    """Apply an encoder frontend: stack frames in pairs, normalise, project.

    :param batch: (N, frames, 80), in the dtype and on the device of ``frontend``.
    :returns: (N, frames // 2, model_dim), zeros on padding.
    """
    seqs, lengths = stack.load().run_frontend(frontend, batch.seqs, batch.lengths)
    return HiddenBatch(zero_padding(seqs, lengths), lengths)


def run_encoder(
    encoder: Module, hidden: HiddenBatch, layers: Layers = None
) -> EncoderOutput:
    """Apply the encoder up to the highest layer asked for.

    :param hidden: (N, S, model_dim), the output of :func:`run_frontend`.
    :param layers: layer numbers; None for the encoder's output alone.
    :raises ArgumentError: if the encoder has no such layer.
    """
    stack_ = stack.load()
    seqs, lengths = hidden.seqs, hidden.lengths
    layered = _layered(encoder)

    if layers is None and layered is not encoder:
        final = _run_unpadded(encoder, seqs, lengths)
        _check_finite(final[0])
        return EncoderOutput({}, lengths, final)

    if layered is None:
        raise ArgumentError(
            f"{type(encoder).__name__} has no `layers` to tell apart; leave out "
            "`layers` for its output."
        )

    num_layers = num_layers_of(encoder)
    wanted = resolve_layers(-1 if layers is None else layers, num_layers)
    found = {0: zero_padding(seqs, lengths)} if 0 in wanted else {}

    if wanted[-1] > 0:
        outputs = stack_.iter_layers(layered, seqs, lengths)
        for number, seqs in enumerate(outputs, start=1):
            if number in wanted:
                found[number] = zero_padding(seqs, lengths)
            if number == wanted[-1]:
                break

    _check_finite(found[wanted[-1]])

    if wanted[-1] < num_layers or layered is not encoder:
        return EncoderOutput(found, lengths, None)

    # Encoders in pre-norm order end in a normalisation that belongs to no block.
    norm = getattr(encoder, "layer_norm", None)
    last = found[num_layers] if norm is None else zero_padding(norm(seqs), lengths)

    return EncoderOutput(found if layers is not None else {}, lengths, (last, lengths))


def _check_finite(seqs: Tensor) -> None:
    """Refuse to hand out NaN: the input was finite, so the weights are to blame."""
    if not bool(seqs.isfinite().all()):
        raise SeamlessW2vBertError(
            "The encoder's output is not finite, although its input is: the weights "
            f"hold NaN or infinity, or {str(seqs.dtype).removeprefix('torch.')} is too "
            "narrow for this model; check the checkpoint, or try float32."
        )


def _run_unpadded(
    encoder: Module, seqs: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply an encoder whose inside is not known, to sequences of one length at a time.

    UnitY's adaptor convolves over padding without masking it, so that in
    seamless_communication an utterance's last frames depend on its batch. Without
    padding they are what they are for the utterance alone.
    """
    outputs: dict[int, Tensor] = {}

    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero().squeeze(1)
        group = seqs[rows.to(seqs.device), :length]
        output, _ = stack.load().run_encoder(
            encoder, group, torch.full((len(rows),), length)
        )
        outputs.update(zip(rows.tolist(), output, strict=True))

    in_order = [outputs[row] for row in range(len(lengths))]

    return (
        pad_sequence(in_order, batch_first=True),
        torch.tensor([len(output) for output in in_order]),
    )


def zero_padding(seqs: Tensor, lengths: Tensor) -> Tensor:
    """Set what stands behind the true lengths to zero. *Shape:* (N, S, M)."""
    if bool((lengths >= seqs.size(1)).all()):
        return seqs

    frames = torch.arange(seqs.size(1), device=seqs.device)
    # (S) < (N, 1) -> (N, S)
    valid = frames < lengths.to(seqs.device).unsqueeze(1)

    return seqs.masked_fill(~valid.unsqueeze(-1), 0)
