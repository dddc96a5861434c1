"""W2v-BERT 2.0, the speech encoder of the Seamless models, run as Seamless runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamless_w2vbert.acceleration import accelerate as accelerate
    from seamless_w2vbert.audio import Waveform as Waveform
    from seamless_w2vbert.batch import FbankBatch as FbankBatch
    from seamless_w2vbert.batch import HiddenBatch as HiddenBatch
    from seamless_w2vbert.checkpoints.convert import (
        convert_checkpoint as convert_checkpoint,
    )
    from seamless_w2vbert.comparison import Comparison as Comparison
    from seamless_w2vbert.comparison import compare as compare
    from seamless_w2vbert.dumping.merge import merge_dumps as merge_dumps
    from seamless_w2vbert.dumping.reader import Dump as Dump
    from seamless_w2vbert.dumping.reader import open_dump as open_dump
    from seamless_w2vbert.dumping.run import DumpReport as DumpReport
    from seamless_w2vbert.dumping.run import dump as dump
    from seamless_w2vbert.dumping.verify import verify_dump as verify_dump
    from seamless_w2vbert.encoder import EncoderOutput as EncoderOutput
    from seamless_w2vbert.errors import ArgumentError as ArgumentError
    from seamless_w2vbert.errors import AudioError as AudioError
    from seamless_w2vbert.errors import CheckpointError as CheckpointError
    from seamless_w2vbert.errors import DumpError as DumpError
    from seamless_w2vbert.errors import SeamlessW2vBertError as SeamlessW2vBertError
    from seamless_w2vbert.errors import StackError as StackError
    from seamless_w2vbert.model import UntrainedModelWarning as UntrainedModelWarning
    from seamless_w2vbert.model import (
        load_conformer_shaw_model as load_conformer_shaw_model,
    )
    from seamless_w2vbert.pipeline import (
        SpeechEncoderPipeline as SpeechEncoderPipeline,
    )
    from seamless_w2vbert.streaming import StreamItem as StreamItem

__version__ = "0.1.0"

_HOMES = {
    "accelerate": "acceleration",
    "Waveform": "audio",
    "FbankBatch": "batch",
    "HiddenBatch": "batch",
    "convert_checkpoint": "checkpoints.convert",
    "Comparison": "comparison",
    "compare": "comparison",
    "merge_dumps": "dumping.merge",
    "Dump": "dumping.reader",
    "open_dump": "dumping.reader",
    "DumpReport": "dumping.run",
    "dump": "dumping.run",
    "verify_dump": "dumping.verify",
    "EncoderOutput": "encoder",
    "ArgumentError": "errors",
    "AudioError": "errors",
    "CheckpointError": "errors",
    "DumpError": "errors",
    "SeamlessW2vBertError": "errors",
    "StackError": "errors",
    "UntrainedModelWarning": "model",
    "load_conformer_shaw_model": "model",
    "SpeechEncoderPipeline": "pipeline",
    "StreamItem": "streaming",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Names are imported when first used: `seamless-w2vbert doctor` has to start where
    # fairseq2 or torch cannot be imported, and `--help` should not wait for either.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
