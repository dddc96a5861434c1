"""Named tensors -> a Transformers folder or a fairseq2 ``.pt`` file, piece by piece.

Comes in: tensors that are mapped from files. Goes out: files that appear whole or not
at all. Both formats are written here, a tensor at a time: their libraries take a whole
state dict, of which every page that they read stays in memory.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import secrets
import shutil
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final, cast

import torch
from torch import Tensor

from seamless_w2vbert.checkpoints import files
from seamless_w2vbert.errors import CheckpointError

_PIECE: Final = 2**20
"""How many numbers of a tensor are cast at a time."""

_RELEASE_EVERY: Final = 64 * 2**20
"""After how many bytes the pages read so far are given back."""

INITIALISED_KEY: Final = "initialised"
"""The key of a fairseq2 file that lists the tensors which no training has seen."""

# torch's dtype -> safetensors' name for it, and torch.save's.
DTYPES: Final[dict[torch.dtype, tuple[str, type | None]]] = {
    torch.float64: ("F64", torch.DoubleStorage),
    torch.float32: ("F32", torch.FloatStorage),
    torch.float16: ("F16", torch.HalfStorage),
    torch.bfloat16: ("BF16", torch.BFloat16Storage),
    torch.int64: ("I64", torch.LongStorage),
    torch.int32: ("I32", None),
    torch.int16: ("I16", None),
    torch.int8: ("I8", None),
    torch.uint8: ("U8", None),
    torch.bool: ("BOOL", None),
}


class SourcePages:
    """The pages of the source's mapped files, which count as this process's memory
    from when they are read until they are given back.

    Only pages under the given tensors are given back, and only where they are mapped
    from a file: others may hold what a model of the same file has been trained to.
    """

    def __init__(self, src: Path, tensors: Iterable[Tensor]) -> None:
        self.src = src
        paths = src.glob("*.safetensors") if src.is_dir() else [src]
        self._files = {os.path.realpath(path) for path in paths}
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._storages = sorted({(s.data_ptr(), s.nbytes()) for s in storages})
        self._read = 0

    def count(self, num_bytes: int) -> None:
        self._read += num_bytes

        if self._read >= _RELEASE_EVERY:
            self.release()

    def release(self) -> None:
        self._read = 0

        for start, end in self._mapped():
            for pointer, size in self._storages:
                # Whole pages within both; those at the edges are not ours alone.
                first = -(-max(start, pointer) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = min(end, pointer + size) // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    length = ctypes.c_size_t(last - first)
                    _LIBC.madvise(ctypes.c_void_p(first), length, mmap.MADV_DONTNEED)

        if hasattr(_LIBC, "malloc_trim"):  # glibc keeps what casts have freed
            _LIBC.malloc_trim(ctypes.c_size_t(0))

    def _mapped(self) -> Iterator[tuple[int, int]]:
        """Yield where the source's files are mapped in this process."""
        maps = Path("/proc/self/maps")

        if not maps.exists():  # not Linux; only memory is lost
            return

        for line in maps.read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self._files:
                start, end = (int(address, 16) for address in fields[0].split("-"))
                yield start, end


_LIBC: Final = ctypes.CDLL(None)


def _pieces(
    name: str, tensor: Tensor, dtype: torch.dtype | None, pages: SourcePages
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order, in the dtype asked for."""
    flat = tensor.reshape(-1)
    wanted = dtype_of(tensor, dtype)

    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        converted = piece.to(wanted)

        if wanted != tensor.dtype and _overflows(piece, converted):
            raise CheckpointError(
                f"{pages.src}: {name} holds values that {wanted} cannot; convert to "
                "bfloat16 or float32."
            )

        yield converted.view(torch.uint8).numpy().data
        pages.count(piece.numel() * piece.element_size())


def _overflows(piece: Tensor, converted: Tensor) -> bool:
    """Tell whether a cast made a number infinite."""
    limit = torch.finfo(converted.dtype).max
    low, high = piece.aminmax()

    if bool((low >= -limit) & (high <= limit)):  # nearly always, and quickly told
        return False

    return bool((converted.isinf() & ~piece.isinf()).any())


def dtype_of(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor in: only floating-point ones change."""
    return dtype if dtype and tensor.is_floating_point() else tensor.dtype


def size_of(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    return tensor.numel() * dtype_of(tensor, dtype).itemsize


def write_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    pages: SourcePages,
) -> None:
    """Write a Transformers folder: safetensors, sharded where need be, and ``configs``
    by the names of their files."""
    for name, config in configs.items():
        _write_json(folder / name, config)

    shards = _shards(state, dtype, max_shard_bytes)
    file_names = [files.WEIGHTS_NAME]

    if len(shards) > 1:
        file_names = [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        weight_map = {
            name: file
            for file, shard in zip(file_names, shards, strict=True)
            for name in shard
        }
        size = sum(size_of(t, dtype) for t in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / files.INDEX_NAME, index)

    for file, shard in zip(file_names, shards, strict=True):
        _write_safetensors(folder / file, shard, dtype, pages)


def _shards(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0

    for name, tensor in state.items():
        num_bytes = size_of(tensor, dtype)
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes

    return shards


def _write_safetensors(
    path: Path,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    pages: SourcePages,
) -> None:
    """Write what ``safetensors.torch.save_file`` would: the header, then the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    order = sorted(state, key=lambda n: (-dtype_of(state[n], dtype).itemsize, n))

    for name in order:
        start, end = end, end + size_of(state[name], dtype)
        header[name] = {
            "dtype": DTYPES[dtype_of(state[name], dtype)][0],
            "shape": list(state[name].shape),
            "data_offsets": [start, end],
        }

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with _created(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for piece in _pieces(name, state[name], dtype, pages):
                file.write(piece)


def write_pt(
    path: Path,
    state: Mapping[str, Tensor],
    initialised: list[str],
    dtype: torch.dtype | None,
    pages: SourcePages,
) -> None:
    """Write what ``torch.save`` would, with its own writer: an uncompressed zip archive
    of one pickle and the bytes of each tensor, at offsets that can be mapped."""
    content: dict[str, Any] = {
        "model": {
            name: _Stored(str(key), tensor, dtype_of(tensor, dtype))
            for key, (name, tensor) in enumerate(state.items())
        },
        "fs2": True,
    }
    if initialised:
        content[INITIALISED_KEY] = initialised

    with _created(path) as file:
        sink = _Sink(file)
        archive = torch._C.PyTorchFileWriter(cast(IO[bytes], sink))
        pickled = _pickle(content)
        archive.write_record("data.pkl", pickled, len(pickled))
        archive.write_record("byteorder", b"little", 6)

        for key, (name, tensor) in enumerate(state.items()):
            data = b"".join(_pieces(name, tensor, dtype, pages))
            archive.write_record(f"data/{key}", data, len(data))
            sink.check()

        archive.write_end_of_file()
        sink.check()


class _Sink:
    """A file for torch's writer, which ends the process where a write raises: errors
    wait for :meth:`check`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as ex:
                self._error = ex

        return memoryview(data).nbytes

    def check(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class _Stored:
    """Stands for a tensor in a pickle: where its bytes are, and what they make."""

    key: str
    tensor: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """Stands for the storage of a tensor in a pickle."""

    stored: _Stored


class _Pickler(pickle.Pickler):
    """Pickles :class:`_Stored` as ``torch.save`` pickles a contiguous tensor."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Stored):
            return NotImplemented

        shape = tuple(obj.tensor.shape)
        stride = torch.empty(shape, device="meta").stride()

        return torch._utils._rebuild_tensor_v2, (
            _Storage(obj),
            0,
            shape,
            stride,
            False,
            OrderedDict(),
        )

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None

        stored = obj.stored
        kind = DTYPES[stored.dtype][1]

        return ("storage", kind, stored.key, "cpu", stored.tensor.numel())


def _pickle(content: object) -> bytes:
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump(content)

    return buffer.getvalue()


# -- all or nothing ------------------------------------------------------------------


@contextmanager
def output(final: Path, dst: Path) -> Iterator[Path]:
    """Yield a path beside ``final``; what is there in the end is moved to ``final``,
    or removed after a failure."""
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")

    try:
        yield temporary
        _move(temporary, final)
        sync_folder(final.parent)
    except OSError as ex:
        raise CheckpointError(
            f"{dst}: cannot be written: {ex.strerror or ex}."
        ) from None
    finally:
        _remove(temporary)


def _move(temporary: Path, final: Path) -> None:
    if not (temporary.is_dir() and final.exists()):
        os.replace(temporary, final)
        return

    # A folder cannot be replaced in one step: the old one steps aside until the new
    # one is there.
    aside = temporary.with_suffix(".old.tmp")
    os.rename(final, aside)

    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(aside, final)
        raise

    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that is on disk when the block ends."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # our own preprocessor_config.json, for the source's

    with _created(path) as file:
        file.write(content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)

    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
