"""Where a dump lives: a local folder, or anything that fsspec reaches by a URL.

Comes in: a path or URL. Goes out: :class:`Store`, whose files appear whole or not at
all. Files are written to a local folder first: beside the dump, so that a rename puts
them in place, or in the system's, to be uploaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seamless_w2vbert.errors import ArgumentError, DumpError, SeamlessW2vBertError
from seamless_w2vbert.urls import filesystem, is_url

_TEMPORARY = ".seamless_w2vbert-tmp"
_LOCK = ".seamless_w2vbert-lock"

_ONE_PIECE = 16 * 2**20
"""The bytes up to which a file is uploaded, and downloaded, in one request."""


class Store:
    """The files of one dump, by names relative to it, with ``/`` between folders."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        """
        :param location: a local folder, or a URL such as ``s3://bucket/folder``.
        :raises DumpError: if nothing is known that reaches the URL.
        """
        self.location = os.fspath(location)

        try:
            self.location.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"{self.location!r}: the name of a dump must be valid UTF-8."
            ) from None

        if not self.location:
            raise ArgumentError("The name of the dump is empty.")

        self.location = self.location.rstrip("/") or "/"
        self._fs: Any = None
        self._root = self.location
        self._cache: Path | None = None

        if is_url(self.location):
            self._fs, self._root = _open_url(self.location)
            if self._fs is None:
                self.location = self._root

        if not self.is_remote:
            self.path = Path(self.location)

    @property
    def is_remote(self) -> bool:
        """Whether it is reached by a URL."""
        return self._fs is not None

    def __truediv__(self, name: str) -> Store:
        return Store(f"{self.location}/{name}")

    def __str__(self) -> str:
        return self.location

    # Filesystems hold connections: what is sent to another process opens its own.
    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.location,)

    # -- reading ---------------------------------------------------------------------

    def exists(self, name: str = "") -> bool:
        """Tell whether there is such a file or folder."""
        with self._errors(name):
            return bool(
                self._fs.exists(self._full(name))
                if self.is_remote
                else (self.path / name).exists()
            )

    def names(self, folder: str = "") -> list[str]:
        """Return the names in ``folder``, sorted; none if there is no such folder."""
        with self._errors(folder):
            try:
                if not self.is_remote:
                    return sorted(os.listdir(self.path / folder))
                entries = self._fs.ls(self._full(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []

        names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries}

        return sorted(names - {""})

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with self._errors(name):
            if self.is_remote:
                return bytes(self._fs.cat_file(self._full(name)))
            return (self.path / name).read_bytes()

    def local(self, name: str) -> Path:
        """Return the path of a local copy of a file or folder, or of itself."""
        if not self.is_remote:
            return self.path / name

        if self._cache is None:
            self._cache = Path(tempfile.mkdtemp(prefix="seamless_w2vbert-"))
            weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)

        copy = self._cache / name

        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = f"{copy}.part"
            with self._errors(name):
                found = self._fs.info(self._full(name))
                if found["type"] == "directory":
                    self._fs.get(f"{self._full(name)}/", f"{part}/", recursive=True)
                elif (found.get("size") or math.inf) <= _ONE_PIECE:
                    # Opened files of some stores, the one in memory among them, share
                    # their position with whoever else reads.
                    Path(part).write_bytes(self._fs.cat_file(self._full(name)))
                else:
                    self._fs.get_file(self._full(name), part)
            os.replace(part, copy)

        return copy

    # -- writing ---------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder if there is none.

        :raises DumpError: if it cannot be made or written to.
        """
        with self._errors("", "written to"):
            if self.is_remote:
                self._fs.makedirs(self._root, exist_ok=True)
            else:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                except (FileExistsError, NotADirectoryError):
                    raise DumpError(f"{self}: is a file; name a folder.") from None
                if not os.access(self.path, os.W_OK):
                    raise DumpError(f"{self}: cannot be written to; name another.")

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """Give an empty local folder to write files in; it is gone afterwards."""
        with self._errors("", "written to"):
            if self.is_remote:
                parent = None
            else:
                parent = self.path / _TEMPORARY
                parent.mkdir(exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=parent))

        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, local: Path, name: str) -> None:
        """Move a file or folder from a workspace to its place, replacing a file.

        Locally it is on the disk when this returns, and appears at once.
        """
        self._forget(name)

        with self._errors(name, "written"):
            if self.is_remote:
                if local.is_dir():
                    for file in sorted(local.rglob("*")):
                        if file.is_file():
                            inner = file.relative_to(local).as_posix()
                            self._upload(file, f"{name}/{inner}")
                else:
                    self._upload(local, name)
                return

            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if local.is_dir():
                for file in local.rglob("*"):
                    _sync(file)
                if target.exists():
                    shutil.rmtree(target)
            _sync(local)
            os.replace(local, target)
            _sync(target.parent)

    def _upload(self, file: Path, name: str) -> None:
        target = self._full(name)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if file.stat().st_size <= _ONE_PIECE:
            # Parts of the index above all: nobody is to see half of one, and not every
            # store that fsspec knows makes a stream of bytes appear at once.
            self._fs.pipe_file(target, file.read_bytes())
        else:
            self._fs.put_file(str(file), target)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        with self.workspace() as folder:
            file = folder / "content"
            with self._errors(name, "written"):
                file.write_bytes(content)
            self.put(file, name)

    def write_new(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one: of several processes one succeeds, on
        stores that can tell. Returns whether it was this one."""
        if self.is_remote:
            if self.exists(name):
                return False
            self.write(name, content)
            return True

        with self.workspace() as folder, self._errors(name, "written"):
            file = folder / "content"
            file.write_bytes(content)
            _sync(file)
            try:
                os.link(file, self.path / name)
            except FileExistsError:
                return False

        return True

    def _forget(self, name: str) -> None:
        """Remove the local copy of what is to change."""
        if self._cache is not None:
            copy = self._cache / name
            if copy.is_dir():
                shutil.rmtree(copy)
            else:
                copy.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        self._forget(name)

        with self._errors(name, "removed"):
            if self.is_remote:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm(self._full(name), recursive=True)
                return

            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing here meanwhile.

        The kernel lets go of it when the process ends, however it ends. Stores behind a
        URL cannot be locked: there, files that could differ have different names.

        :raises DumpError: if another process has it.
        """
        if self.is_remote:
            yield
            return

        with self._errors(_LOCK, "written"):
            file = open(self.path / _LOCK, "a+b")  # noqa: SIM115

        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as ex:
                if not isinstance(ex, BlockingIOError):
                    raise DumpError(f"{self}: cannot be locked: {ex.strerror}.") from ex
                raise DumpError(
                    f"{self}: another process is writing to this dump; wait for it, or "
                    "give each its share with --shard-index and --num-shards."
                ) from None

            # What a killed process left half-written.
            shutil.rmtree(self.path / _TEMPORARY, ignore_errors=True)
            try:
                yield
            finally:
                shutil.rmtree(self.path / _TEMPORARY, ignore_errors=True)

    # -- names and errors ------------------------------------------------------------

    def _full(self, name: str) -> str:
        """Return the path behind the URL, of which no old listing is to be believed."""
        path = f"{self._root}/{name}".rstrip("/") if name else self._root
        self._fs.invalidate_cache(path)

        return path

    @contextlib.contextmanager
    def _errors(self, name: str, verb: str = "read") -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as ex:
            if verb == "read":
                raise
            raise self._error(name, verb, ex) from ex
        except OSError as ex:
            raise self._error(name, verb, ex) from ex
        except SeamlessW2vBertError:
            raise
        except Exception as ex:  # filesystems behind URLs have exceptions of their own
            if not self.is_remote:
                raise
            raise self._error(name, verb, ex) from ex

    def _error(self, name: str, verb: str, ex: Exception) -> DumpError:
        where = f"{self}/{name}" if name else str(self)
        reason = getattr(ex, "strerror", None) or ex
        return DumpError(
            f"{where}: cannot be {verb}: {reason}. What was written before "
            "is safe; run the same command again to go on."
        )


def _open_url(url: str) -> tuple[Any, str]:
    """Return what reaches a URL, None for a local folder, and the path there."""
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, path = filesystem(url)
    except (ImportError, ValueError) as ex:
        raise DumpError(f"{url}: cannot be reached: {ex}") from None

    # Local folders can be locked, and files in them renamed and mapped.
    return None if isinstance(fs, LocalFileSystem) else fs, path.rstrip("/")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()

    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)

    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or renamed in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
