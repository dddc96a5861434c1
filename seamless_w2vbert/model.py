"""A name, card or path -> a model with ``encoder_frontend`` and ``encoder``.

Comes in: whatever names a checkpoint. Goes out: fairseq2's own modules, built on the
meta device and given the checkpoint's tensors as they lie on disk, so that a model
costs its weights once.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import layer_norm

from seamless_w2vbert import heads, stack
from seamless_w2vbert.architecture import TINY
from seamless_w2vbert.checkpoints import Checkpoint, hub, read_checkpoint, shapes, tiny
from seamless_w2vbert.errors import ArgumentError, CheckpointError

TINY_RANDOM = "tiny-random"
"""A small untrained encoder, for trying things offline."""

CONFORMER_SHAW = "conformer_shaw"
"""The published W2v-BERT 2.0."""


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What a model can be computed in."""


class UntrainedModelWarning(UserWarning):
    """The model's weights are random: its embeddings mean nothing."""


def load_conformer_shaw_model(
    model_name_or_card: str | os.PathLike[str] | object,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Module:
    """Load a W2v-BERT 2.0 model.

    The counterpart of seamless_communication's ``load_conformer_shaw_model``. With that
    package importable, its own builder makes the modules. Nothing in a checkpoint is
    ever executed.

    :param model_name_or_card:
        ``"conformer_shaw"``, the published model, fetched from Hugging Face once;
        ``"tiny-random"``, small and untrained; a fairseq, fairseq2 or safetensors
        file; a Transformers folder; the name of an asset card that fairseq2 knows, or
        an ``AssetCard``.
    :param device: where the parameters go.
    :param dtype: the dtype of the parameters.

    :returns:
        fairseq2's ``Wav2Vec2Model`` where the checkpoint holds the pretraining heads;
        else a module with ``encoder_frontend`` and ``encoder`` alone. In evaluation
        mode.
    :raises CheckpointError: if there is no such checkpoint, or it is damaged, unsafe
        or of another architecture; the message names the file and the tensor.
    """
    device = check_device(device)

    if dtype not in DTYPES:
        raise ArgumentError(
            f"A model cannot be of dtype {dtype}; expected one of "
            f"{', '.join(map(str, DTYPES))}."
        )

    if isinstance(model_name_or_card, str) and model_name_or_card == TINY_RANDOM:
        warnings.warn(
            "tiny-random is untrained: its embeddings are of the right kind and mean "
            "nothing. Pass a real model, such as conformer_shaw, for real ones.",
            UntrainedModelWarning,
            stacklevel=2,
        )
        model = stack.load().build_model(TINY)
        expected = {name: t.shape for name, t in model.state_dict().items()}
        return _assign(model, tiny.draw(expected), device, dtype)

    checkpoint = _open(model_name_or_card)
    tensors = dict(checkpoint.tensors)
    try:
        model = stack.load().build_model(checkpoint.architecture)
    except (RuntimeError, ValueError, OverflowError) as ex:
        raise CheckpointError(
            f"{checkpoint.path}: no model has its sizes: {ex}"
        ) from None

    if checkpoint.format == "transformers":
        tensors = _attach_heads(model, checkpoint)

    expected_state = model.state_dict()

    # fairseq keeps no count of the quantizer's updates; Seamless sets it to zero.
    if "quantizer.num_updates" in expected_state:
        tensors.setdefault("quantizer.num_updates", torch.zeros((), dtype=torch.int64))

    shapes.check(tensors, expected_state, checkpoint.path)

    return _assign(model, tensors, device, dtype)


def check_device(device: torch.device | str) -> torch.device:
    """Return the device if this torch can compute on it here.

    :raises ArgumentError: if it cannot.
    """
    try:
        checked = torch.device(device)
        if checked.type == "meta":
            raise ValueError("the meta device computes nothing")
        torch.empty(0, device=checked)
    except (RuntimeError, TypeError, ValueError, AssertionError, ImportError) as ex:
        reason = str(ex).strip().splitlines()[0] if str(ex).strip() else repr(ex)
        raise ArgumentError(
            f"Device {device!r} cannot be used here: {reason.rstrip('.')}; try cpu or "
            "cuda."
        ) from None

    return checked


def _open(name: str | os.PathLike[str] | object) -> Checkpoint:
    if isinstance(name, (str, os.PathLike)) and os.path.exists(name):
        return read_checkpoint(Path(name))

    if isinstance(name, str) and name == CONFORMER_SHAW:
        return read_checkpoint(hub.download())

    if isinstance(name, os.PathLike):
        raise CheckpointError(f"{os.fspath(name)}: there is no such file or folder.")

    card = stack.load().find_card(name)

    if card is None:
        raise CheckpointError(
            f"{name}: is neither a file, nor a folder, nor a model that is known by "
            f"name ({CONFORMER_SHAW}, {TINY_RANDOM}, or an asset card of fairseq2's)."
        )

    return read_checkpoint(card.path)


def _attach_heads(model: Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Put on ``model`` what Transformers' fine-tuning did, and return all its tensors.
    Heads that have no place here are left out, with a warning that names them."""
    added = heads.attach(
        model, checkpoint.other, checkpoint.config or {}, checkpoint.path
    )
    taken = {name.split(".")[1] for name in added} | {"masker"}
    left_out = sorted({name.split(".")[0] for name in checkpoint.other} - taken)

    if left_out:
        warnings.warn(
            f"{checkpoint.path}: {', '.join(left_out)} are no part of the encoder and "
            "are left out.",
            stacklevel=3,
        )

    # An adapter wraps the encoder, whose tensors then have a longer name.
    wrapped = isinstance(model.encoder, heads.AdaptedEncoder)
    encoder = {
        re.sub(r"^encoder\.", "encoder.inner.", name) if wrapped else name: tensor
        for name, tensor in checkpoint.tensors.items()
    }

    return {**encoder, **added}


def _assign(
    model: Module,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Module:
    state_dict = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }

    # Parameters become the tensors themselves: memory-mapped ones stay on disk until
    # they are used, and the meta device has allocated nothing.
    model.load_state_dict(state_dict, assign=True)

    if dtype == torch.float16 and not has_half_layer_norm(device):
        use_float32_layer_norm(model)

    return model.eval()


def use_float32_layer_norm(model: Module) -> None:
    """Make the layer norms of ``model`` compute in float32, whatever they are given."""
    for module in model.modules():
        if hasattr(module, "normalized_shape"):
            module.forward = MethodType(_layer_norm_in_float32, module)


def has_half_layer_norm(device: torch.device) -> bool:
    """Tell whether torch normalises float16 on ``device``; 2.2 does not on CPU."""
    try:
        layer_norm(torch.zeros(1, 2, dtype=torch.float16, device=device), (2,))
    except RuntimeError:
        return False

    return True


def _layer_norm_in_float32(module: Any, seqs: Tensor) -> Tensor:
    normalized = layer_norm(
        seqs.float(),
        module.normalized_shape,
        module.weight.float(),
        module.bias.float(),
        module.eps,
    )

    return normalized.type_as(seqs)
