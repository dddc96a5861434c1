"""A shard as a safetensors file: a tensor per utterance and layer, by name.

Comes in: utterances. Goes out: a file that ``safetensors.torch.load_file`` opens, in
every dtype that the model runs in, and whose tensors are read without a copy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from seamless_w2vbert.dumping.formats.base import (
    DTYPES,
    Layout,
    ShardReader,
    ShardWriter,
    map_file,
    reading,
)
from seamless_w2vbert.errors import DumpError

_MAX_HEADER: Final = 100_000_000
"""Bytes of the longest header that safetensors reads."""

_ENTRY: Final = 160
"""Bytes that a tensor takes in the header besides its name, at most."""

_METADATA: Final = "__metadata__"
"""The one name that a tensor cannot have."""

# Our name -> safetensors' name, and the NumPy dtype of the same bits.
_CODES: Final = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", np.uint16),
}


class SafetensorsWriter(ShardWriter):
    """Writes ``shard.safetensors`` when it is closed; until then it holds the shard."""

    format = "safetensors"
    dtypes = DTYPES

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        self._path = folder / "shard.safetensors"
        self._tensors: dict[str, Tensor] = {}
        self._header = 1024

    def _write(
        self,
        id: str,
        tensors: Sequence[Tensor],
        columns: Mapping[str, Any],
        frames: int | None,
    ) -> int:
        names = [tensor_name(id, layer, self._layout) for layer in self._layout.layers]
        header = sum(len(json.dumps(name)) + _ENTRY for name in names)

        if self._header + header > _MAX_HEADER:
            raise DumpError(
                f"{id}: does not fit: the names in a safetensors file take 100 MB at "
                "most; make smaller shards, or take the format parquet."
            )

        for name, tensor in zip(names, tensors, strict=True):
            # What is given is a part of a batch, which must not stay for it.
            self._tensors[name] = tensor.clone()

        self._header += header

        return 0

    def close(self) -> Path:
        # safetensors makes a file that only its owner can read.
        self._path.touch()
        mode = self._path.stat().st_mode

        try:
            save_file(self._tensors, self._path, metadata={"format": "pt"})
        except SafetensorError as ex:
            if number := re.search(r"\(os error (\d+)\)", str(ex)):
                raise OSError(int(number[1]), str(ex), str(self._path)) from ex
            raise

        self._path.chmod(mode)
        self._tensors = {}

        return self._path

    def discard(self) -> None:
        self._tensors = {}


class SafetensorsReader(ShardReader):
    """Reads ``shard.safetensors``: arrays are the file's own bytes, mapped.

    bfloat16 is the exception: NumPy has no such dtype, so it is copied to float32.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)

        with reading(path):
            mapped = map_file(path)
            length = int.from_bytes(mapped[:8].tobytes(), "little")
            if not 0 < length <= min(_MAX_HEADER, len(mapped) - 8):
                raise ValueError("it is cut short, or not a safetensors file")
            self._header = json.loads(mapped[8 : 8 + length].tobytes())
            if not isinstance(self._header, dict):
                raise ValueError("its header is not a JSON object")
            self._header.pop(_METADATA, None)
            self._data = mapped[8 + length :]

    def _find(self, id: str, layer: int, offset: int, frames: int) -> NDArray[Any]:
        name = tensor_name(id, layer, self._layout)

        if name not in self._header:
            self._differs(f"it holds no tensor {name!r}")

        entry = self._header[name]
        code, dtype = _CODES[self._layout.dtype]
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])

        if (
            entry["dtype"] != code
            or not 0 <= begin <= end <= len(self._data)
            or end - begin != math.prod(shape) * np.dtype(dtype).itemsize
        ):
            raise ValueError(f"its header is wrong about tensor {name!r}")

        return self._data[begin:end].view(dtype).reshape(shape)

    def _check(self, ids: Sequence[str], frames: Sequence[int]) -> None:
        layers = self._layout.layers

        if len(self._header) != len(ids) * len(layers):
            self._differs(
                f"it has {len(self._header)} tensors, not {len(ids) * len(layers)}"
            )

        for id, n in zip(ids, frames, strict=True):
            for layer in layers:
                self.read(id, layer, 0, n, stop=0)


def tensor_name(id: str, layer: int, layout: Layout) -> str:
    """Return the name of a tensor: the id, or ``id#layer`` if there are several layers.

    An id ``__metadata__``, which safetensors keeps for itself, gets one more ``#``.
    """
    if len(layout.layers) > 1:
        return f"{id}#{layer}"

    if id.startswith(_METADATA) and not id[len(_METADATA) :].strip("#"):
        return f"{id}#"

    return id
