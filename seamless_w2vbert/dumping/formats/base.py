"""What the storage formats of a dump share: the layout, the writer and the reader.

Comes in: the embeddings of one utterance after another. Goes out: one file or folder, a
shard, that an index points into. A format only says how arrays become bytes and back;
what all of them refuse, and how arrays are lent to callers, stands here.
"""

from __future__ import annotations

import mmap
import struct
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from seamless_w2vbert.errors import ArgumentError, DumpError

DTYPES: Final = ("float32", "float16", "bfloat16")
"""What vectors are stored as."""

_SMALL: Final = 2**16
"""Bytes below which a copy costs less than what a view keeps open."""

_MAX_MAPS: Final = 256
"""Files that callers may hold mapped at a time; each takes a file descriptor."""

_NPY_HEADER: Final = 128
"""Bytes before the values of an ``.npy`` file."""

_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


@dataclass(frozen=True)
class Layout:
    """What the arrays of a dump look like."""

    layers: tuple[int, ...]
    """The layers stored of each utterance, in the order in which they are."""

    dim: int
    """The width of a stored vector."""

    dtype: str
    """``float32``, ``float16`` or ``bfloat16``."""

    pooled: bool = False
    """Whether an utterance has one vector, (dim,), instead of (frames, dim)."""

    columns: Mapping[str, pa.DataType] = field(default_factory=dict)
    """The columns carried over from the source, with their types."""


class ShardWriter(ABC):
    """Writes one shard into an empty local folder.

    Errors of the disk, such as one that is full, come out as the ``OSError`` that they
    are, with their ``errno``.
    """

    format: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def __init__(self, folder: Path, layout: Layout) -> None:
        """
        :param folder: an empty local folder.
        :param layout: what :meth:`add` will be given.
        :raises ArgumentError: if the format cannot hold that.
        """
        self.check_layout(layout)
        self._folder = folder
        self._layout = layout
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._ids: set[str] = set()

    @classmethod
    def check_dtype(cls, dtype: str) -> None:
        """
        :raises ArgumentError: if the format has no such dtype.
        """
        if dtype in cls.dtypes:
            return

        if dtype not in DTYPES:
            raise ArgumentError(
                f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}."
            )

        raise ArgumentError(
            f"The format {cls.format} has no {dtype}: store {cls.dtypes[0]}, which "
            f"holds every {dtype} exactly, or {cls.dtypes[1]}, or take the format "
            "safetensors, which has all three."
        )

    @classmethod
    def check_layout(cls, layout: Layout) -> None:
        """
        :raises ArgumentError: if the format has no such dtype, or cannot carry a
            column of that name.
        """
        cls.check_dtype(layout.dtype)

    def add(
        self,
        id: str,
        arrays: Mapping[int, Tensor],
        columns: Mapping[str, Any],
        frames: int | None = None,
    ) -> int:
        """Append an utterance, and return the offset that the index needs to find it.

        :param arrays: for each layer a tensor on the CPU, in the dtype of the layout.
            *Shape:* (frames, dim), or (dim,) if pooled. It is free to change later.
        :param columns: the values of the carried columns; one that is missing is null.
        :param frames: how many frames a pooled vector stands for, to be kept where the
            format has a place for it.
        :raises DumpError: if a tensor is not as the layout says or holds NaN or
            infinity, if the id was there before or is not valid Unicode, or if the
            format cannot hold so much. The shard stays as it was before.
        """
        try:
            id.encode()
        except UnicodeEncodeError:
            raise DumpError(
                f"{id!r}: an id must be valid Unicode, which this one is not; give the "
                "utterance another id."
            ) from None

        if id in self._ids:
            raise DumpError(f"{id}: this id occurs twice; ids must differ.")

        tensors = self._checked(id, arrays)

        if not self._layout.pooled:
            frames = len(tensors[0])

        offset = self._write(id, tensors, columns, frames)
        self._ids.add(id)

        return offset

    def _checked(self, id: str, arrays: Mapping[int, Tensor]) -> list[Tensor]:
        layout = self._layout

        if set(arrays) != set(layout.layers):
            raise DumpError(
                f"{id}: layers {list(layout.layers)} were expected, but there are "
                f"{sorted(arrays)}."
            )

        tensors = [arrays[layer].detach() for layer in layout.layers]

        for layer, tensor in zip(layout.layers, tensors, strict=True):
            shape = tuple(tensor.shape)
            if layout.pooled:
                expected: tuple[int, ...] = (layout.dim,)
            else:
                expected = (max(len(tensors[0]), 1), layout.dim)
            if tensor.dtype != self._dtype or shape != expected:
                raise DumpError(
                    f"{id}: layer {layer} must be {layout.dtype} of shape {expected}, "
                    f"but is {str(tensor.dtype).removeprefix('torch.')} of {shape}."
                )
            self.check_size(id, tensor)

        for layer, tensor in zip(layout.layers, tensors, strict=True):
            if not torch.isfinite(tensor).all():
                raise DumpError(
                    f"{id}: layer {layer} holds NaN or infinite values, which are not "
                    f"stored. If it is {layout.dtype} that they exceed, store float32."
                )

        return [tensor.contiguous() for tensor in tensors]

    @classmethod  # noqa: B027
    def check_size(cls, id: str, tensor: Tensor) -> None:
        """
        :raises DumpError: if the format cannot hold an array of that size.
        """

    @abstractmethod
    def _write(
        self,
        id: str,
        tensors: Sequence[Tensor],
        columns: Mapping[str, Any],
        frames: int | None,
    ) -> int:
        """Append what was found to be right; ``tensors`` are contiguous, by layer."""

    @abstractmethod
    def close(self) -> Path:
        """Finish the shard, and return its file or folder, which lies in the folder
        given to the constructor."""

    def discard(self) -> None:  # noqa: B027
        """Let go of a shard that will not be finished, without an error of its own.

        What was written of it stays in the folder.
        """


class ShardReader(ABC):
    """Reads a shard from a local path. Arrays that it returns are read-only."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """
        :param path: the file or folder that the writer's ``close`` returned.
        :param layout: the layout it was written with; columns are not looked at.
        :raises DumpError: if it is missing or damaged.
        """
        self._path = path
        self._layout = layout

    def read(
        self,
        id: str,
        layer: int,
        offset: int,
        frames: int,
        start: int = 0,
        stop: int | None = None,
    ) -> NDArray[Any]:
        """Return the array of one utterance and layer, or some frames of it.

        :param offset: what the writer's ``add`` returned.
        :param frames: how many frames the index says that the utterance has.
        :param start: the first frame wanted.
        :param stop: one past the last frame wanted, by default the end.

        :returns:
            Read-only float32 or float16; bfloat16, which NumPy lacks, as float32, a
            copy. *Shape:* (frames, dim), or (dim,) if pooled.

        :raises DumpError: if the shard does not hold that, or is damaged.
        """
        with reading(self._path):
            array = self._find(id, layer, offset, frames)

        layout = self._layout
        expected = (layout.dim,) if layout.pooled else (frames, layout.dim)

        if array.shape != expected:
            raise DumpError(
                f"{self._path}: {id}, layer {layer}, has shape {array.shape}, but the "
                f"index says {expected}; {WAY_OUT}"
            )

        if not layout.pooled:
            array = array[start:stop]

        if layout.dtype == "bfloat16":
            # The upper half of a float32 is the bfloat16.
            array = (np.asarray(array).astype(np.uint32) << 16).view(np.float32)

        array = self._lend(array)
        array.flags.writeable = False

        return array

    def check(
        self, rows: Sequence[tuple[str, int]], offsets: Sequence[int] | None = None
    ) -> None:
        """Compare what the shard itself says about its content with the index.

        Ids are compared where the format holds them, shapes everywhere; the values of
        the arrays are not looked at.

        :param rows: id and number of frames of the utterances of the shard, in the
            order in which they were added.
        :param offsets: for each its offset.
        :raises DumpError: that says what the first difference is.
        """
        ids = [id for id, _ in rows]
        frames = [n for _, n in rows]
        expected = self._offsets(frames)

        with reading(self._path):
            for id, is_, said in zip(ids, expected, offsets or expected, strict=True):
                if is_ != said:
                    self._differs(f"{id} is at {is_}, not at {said}")

            self._check(ids, frames)

    @property
    def path(self) -> Path:
        """The file or folder that it reads."""
        return self._path

    def _differs(self, what: str) -> None:
        raise DumpError(f"{self._path}: differs from the index: {what}; {WAY_OUT}")

    def release(self) -> None:  # noqa: B027
        """Give back memory that is kept to make the next read faster."""

    @abstractmethod
    def _find(self, id: str, layer: int, offset: int, frames: int) -> NDArray[Any]:
        """Return a whole array without copying it; bfloat16 as its bits."""

    @abstractmethod
    def _check(self, ids: Sequence[str], frames: Sequence[int]) -> None:
        """Compare content with the index; see :meth:`check`."""

    def _offsets(self, frames: Sequence[int]) -> Sequence[int]:
        """Return the offsets of utterances of so many frames."""
        return [0] * len(frames)

    def _lend(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return ``array``, or a copy where a caller who keeps many such views would
        run out of file descriptors."""
        if isinstance(array, np.memmap) and (
            array.nbytes < _SMALL or len(_maps) > _MAX_MAPS
        ):
            return np.array(array)

        return array


WAY_OUT: Final = (
    "`seamless-w2vbert verify` on the dump says all that is wrong with it, and what to "
    "do."
)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a missing or damaged file raises into a :class:`DumpError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as ex:
        missing = ex.filename or path
        raise DumpError(f"{missing}: is not there; {WAY_OUT}") from ex
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        struct.error,
        pa.ArrowException,
    ) as ex:
        raise DumpError(f"{path}: cannot be read: {ex}; {WAY_OUT}") from ex


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what stands before the values of an ``.npy`` file of version 1.0.

    It is as long for any shape. ``np.save`` would do for files written at once, but of
    a disk that is full it does not say that it is.
    """
    described = {
        "descr": np.dtype(dtype).str,
        "fortran_order": False,
        "shape": shape,
    }
    text = f"{described!r:<{_NPY_HEADER - 11}}\n".encode()

    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file into memory. *Shape:* (bytes,)"""
    return _registered(np.memmap(path, dtype=np.uint8, mode="r"))


def map_npy(path: Path) -> NDArray[Any]:
    """Map the array of an ``.npy`` file, or load it if it is small or much is mapped.

    :raises ValueError: if it is not such a file.
    """
    if path.stat().st_size < _SMALL or len(_maps) > _MAX_MAPS:
        return np.asarray(np.load(path))

    return _registered(np.load(path, mmap_mode="r"))


def _registered(array: NDArray[Any]) -> NDArray[Any]:
    # A view keeps alive not the array that it was made of but what is mapped.
    _maps.add(array._mmap)  # type: ignore[attr-defined]
    return array
