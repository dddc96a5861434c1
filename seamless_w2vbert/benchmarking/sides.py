"""The implementations that are measured, each behind the same three calls.

Comes in: what to run. Goes out: a :class:`Runner`, made in the process that will run
it. All start from ready-made fbanks of equal length: none has padding to mask.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from seamless_w2vbert.errors import SeamlessW2vBertError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from seamless_w2vbert.benchmarking.limit import Sizes
    from seamless_w2vbert.pipeline import SpeechEncoderPipeline

# Libraries are imported where they are used: each side's process is to hold its own.


class MissingSideError(SeamlessW2vBertError):
    """A side is not installed here, or cannot run this model."""


@dataclass(frozen=True)
class Settings:
    """What a side is made from."""

    side: str
    dtype: str
    model: str
    num_layers: int | None
    device: str
    threads: int
    folder: str
    """Where the sides of one benchmark may leave files for each other."""


class Runner(Protocol):
    """One implementation with its weights."""

    frames: slice
    """Which of the encoder's frames its output has; all but for CTranslate2."""

    def prepare(self, fbanks: NDArray[np.float32]) -> Any:
        """Turn (N, frames, 80) into what it takes; not timed."""

    def run(self, prepared: Any, layer: int | None) -> Any:
        """Encode, up to ``layer`` where one is given; what is timed."""

    def output(self, result: Any) -> NDArray[np.float32]:
        """Return (N, S, model_dim) in float32."""


class TorchRunner(ABC):
    """What the sides that are torch modules share."""

    frames = slice(None)

    def __init__(self, module: Module, settings: Settings) -> None:
        import torch

        self.module = module
        self.device = torch.device(settings.device)
        self.dtype = getattr(torch, settings.dtype)

    def tensor(self, array: NDArray[np.float32]) -> Tensor:
        import torch

        return torch.from_numpy(array).to(self.device, self.dtype)

    def run(self, prepared: Any, layer: int | None) -> Tensor:
        import torch

        with torch.inference_mode():
            result = self.encode(prepared, layer)

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

        return result

    @abstractmethod
    def encode(self, prepared: Any, layer: int | None) -> Tensor:
        """Run the encoder, up to a layer; None for all of it."""

    def output(self, result: Tensor) -> NDArray[np.float32]:
        array: NDArray[np.float32] = result.float().cpu().numpy()
        return array


class PackageRunner(TorchRunner):
    """This package: its pipeline from ``encoder_frontend`` on, accelerated."""

    def __init__(self, module: Module, settings: Settings) -> None:
        from seamless_w2vbert.acceleration import accelerate
        from seamless_w2vbert.benchmarking.models import sizes_of
        from seamless_w2vbert.pipeline import SpeechEncoderPipeline

        super().__init__(module, settings)
        self.sizes: Sizes = sizes_of(module)
        self.pipeline: SpeechEncoderPipeline = SpeechEncoderPipeline(accelerate(module))

    def prepare(self, fbanks: NDArray[np.float32]) -> Any:
        import torch

        from seamless_w2vbert.batch import FbankBatch

        n, frames, _ = fbanks.shape
        return FbankBatch(self.tensor(fbanks), torch.full((n,), frames))

    def encode(self, prepared: Any, layer: int | None) -> Tensor:
        hidden = self.pipeline.encoder_frontend(prepared)
        if layer is None:
            return self.pipeline.encoder(hidden).last_hidden_state
        return self.pipeline.encoder(hidden, layers=(layer,)).hidden_states[layer]


class StockRunner(TorchRunner):
    """fairseq2's own modules, or seamless_communication's, as they come."""

    def prepare(self, fbanks: NDArray[np.float32]) -> Any:
        import torch

        n, frames, _ = fbanks.shape
        return self.tensor(fbanks), torch.full((n,), frames)

    def encode(self, prepared: Any, layer: int | None) -> Tensor:
        from seamless_w2vbert import encoder, stack

        seqs, lengths = stack.load().run_frontend(
            encoder.frontend_of(self.module), *prepared
        )
        seqs, _ = stack.load().run_encoder(
            encoder.encoder_of(self.module), seqs, lengths
        )
        return seqs


class TransformersRunner(TorchRunner):
    """Transformers' ``Wav2Vec2BertModel`` with the same weights."""

    def prepare(self, fbanks: NDArray[np.float32]) -> Any:
        n, frames, bins = fbanks.shape
        # (N, frames, 80) -> (N, frames // 2, 160)
        stacked = fbanks[:, : frames - frames % 2].reshape(n, frames // 2, 2 * bins)
        return self.tensor(np.ascontiguousarray(stacked))

    def encode(self, prepared: Any, layer: int | None) -> Tensor:
        output: Tensor = self.module(prepared).last_hidden_state
        return output


# -- making them ---------------------------------------------------------------------


_TRANSFORMERS_MODEL = "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert"


def import_libraries(side: str) -> None:
    """Import what a side needs, so that loading it costs its weights alone."""
    if side == "ctranslate2":
        importlib.import_module("ctranslate2")
        return

    from seamless_w2vbert import stack

    stack.load()
    if side == "transformers":
        importlib.import_module(_TRANSFORMERS_MODEL)


def check_installed(side: str) -> None:
    """
    :raises MissingSideError: if what a side runs is not installed.
    """
    if side == "seamless" and not _is_installed("seamless_communication"):
        raise MissingSideError(
            "it is not installed (it needs fairseq2 0.2); the side fairseq2 runs the "
            "same architecture in stock modules of the installed fairseq2"
        )

    if side == "transformers" and not _is_installed("transformers"):
        raise MissingSideError("it is not installed: pip install '.[transformers]'")

    if side == "ctranslate2":
        # Its converter reads Transformers' models.
        for name in ("ctranslate2", "transformers"):
            if not _is_installed(name):
                raise MissingSideError(
                    f"{name} is not installed: pip install '.[bench]'"
                )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def make(settings: Settings) -> Runner:
    """Load a side.

    :raises MissingSideError: if it cannot be had here.
    """
    return _MAKERS[settings.side](settings)


def _stock(settings: Settings) -> Module:
    import torch

    from seamless_w2vbert.benchmarking.models import load_stock

    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.dtype)

    return load_stock(settings.model, settings.num_layers, dtype, settings.device)


def _make_package(settings: Settings) -> Runner:
    return PackageRunner(_stock(settings), settings)


def _make_fairseq2(settings: Settings) -> Runner:
    return StockRunner(_stock(settings), settings)


def _make_seamless(settings: Settings) -> Runner:
    try:
        importlib.import_module("seamless_communication.models.conformer_shaw")
    except Exception as ex:
        raise MissingSideError(
            f"it is installed, but cannot be imported ({ex})"
        ) from None

    # With it importable, the stack's builder is its own: these are its modules.
    return StockRunner(_stock(settings), settings)


def _make_transformers(settings: Settings) -> Runner:
    return TransformersRunner(_twin(settings), settings)


def _twin(settings: Settings) -> Any:
    """Return Transformers' model with the weights of the stock modules."""
    from seamless_w2vbert.comparison.sides import PackageSide, transformers_twin
    from seamless_w2vbert.pipeline import SpeechEncoderPipeline

    side = PackageSide(SpeechEncoderPipeline(_stock(settings)), settings.model)

    return transformers_twin(side, None).model


def _make_ctranslate2(settings: Settings) -> Runner:
    from seamless_w2vbert.benchmarking import peer_ctranslate2

    return peer_ctranslate2.CTranslate2Runner(settings)


_MAKERS: dict[str, Callable[[Settings], Runner]] = {
    "package": _make_package,
    "transformers": _make_transformers,
    "seamless": _make_seamless,
    "fairseq2": _make_fairseq2,
    "ctranslate2": _make_ctranslate2,
}


def convert_for_ctranslate2(settings: Settings) -> None:
    """Leave the model in CTranslate2's format in ``settings.folder``; a job for a
    process of its own, so that the side's memory is its own."""
    from seamless_w2vbert.benchmarking import peer_ctranslate2

    peer_ctranslate2.convert(_twin(settings), settings.folder)
