"""A loaded model -> the same model with attention that scales.

Comes in: this package's model, seamless_communication's (UnitY included), or one of
Transformers. Goes out: the same object, whose Shaw attention is
:func:`attention.shaw_attention`. Parameters and their names stay.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module

from seamless_w2vbert import stack
from seamless_w2vbert.attention import shaw_attention
from seamless_w2vbert.errors import ArgumentError

ModuleT = TypeVar("ModuleT", bound=Module)


def accelerate(model: ModuleT) -> ModuleT:
    """Swap the Shaw attention of ``model`` for one in linear memory, in place.

    Results stay the same but for rounding, and gradients flow. Where a call asks for
    attention weights, for dropout in attention or for an attention mask of its own,
    the stock implementation answers it as before.

    fairseq2's Conformer blocks also run in a leaner form
    (:mod:`seamless_w2vbert.block`) whenever no gradient is asked for: on CUDA in
    float32, float16 or bfloat16, on CPU in float32 or bfloat16. Blocks with hooks or
    parts of your own inside them run as they are. On CPU that takes the memory of their
    weights once more, which for weights that are mapped from a file the system can take
    back from the first. Weights that change are packed anew; after writing a part of
    one through ``.data``, which nothing records, call this again. Transformers' models
    get the attention alone.

    :param model: any module with fairseq2's ``ShawRelativePositionSDPA`` or
        Transformers' ``Wav2Vec2BertSelfAttention`` in it. What has been accelerated
        before may be so again.
    :returns: ``model`` itself.
    :raises ArgumentError: if there is no such attention in it.
    """
    swapped = _swap_in_transformers(model)

    if swapped == 0:
        stack_ = stack.load()
        swapped = stack_.swap_shaw_attention(model)
        if swapped > 0:
            stack_.pack_blocks(model)

    if swapped == 0:
        raise ArgumentError(
            f"{type(model).__name__} has no Shaw relative attention to accelerate."
        )

    return model


# -- Transformers --------------------------------------------------------------------

_MODELING = "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert"
_LINEAR = "LinearWav2Vec2BertSelfAttention"


def _swap_in_transformers(model: Module) -> int:
    """Make Transformers' attention ours, and return how many modules of it are."""
    modeling = sys.modules.get(_MODELING)

    if modeling is None:  # then no model is of it
        return 0

    stock = modeling.Wav2Vec2BertSelfAttention
    linear = _linear_class(stock)
    swapped = 0

    for module in model.modules():
        if (
            type(module) in (stock, linear)
            and module.position_embeddings_type == "relative_key"
        ):
            module.__class__ = linear
            swapped += 1

    return swapped


@cache
def _linear_class(stock: type[Module]) -> type[Module]:
    """Return Transformers' attention with :func:`attention.shaw_attention` in it."""
    members = {"forward": _transformers_forward(stock.forward), "__module__": __name__}

    return type(_LINEAR, (stock,), members)


def __getattr__(name: str) -> Any:  # for pickle, which asks by name
    if name == _LINEAR:
        modeling = importlib.import_module(_MODELING)
        return _linear_class(modeling.Wav2Vec2BertSelfAttention)

    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _transformers_forward(stock: Any) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if output_attentions or (self.training and self.dropout.p > 0):
            result: tuple[Tensor, Tensor | None] = stock(
                self,
                hidden_states,
                attention_mask,
                relative_position_embeddings,
                output_attentions,
            )
            return result

        # (N, S, M) -> (N, H, S, K)
        q, k, v = (
            linear(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        # The mask is additive, (N, 1, S, S), and the same for each query.
        keep = None if attention_mask is None else attention_mask[:, 0, 0] == 0
        attended = shaw_attention(
            q,
            k,
            v,
            self.distance_embedding.weight.to(q.dtype),
            self.left_max_position_embeddings,
            keep,
        )
        # (N, H, S, K) -> (N, S, M)
        return self.linear_out(attended.transpose(1, 2).flatten(-2)), None

    return forward
