"""The exceptions of this package: what a caller may want to tell apart.

Every message names the file or argument at fault and says what to do about it.
"""

from __future__ import annotations


class SeamlessW2vBertError(Exception):
    """The base of every error that this package raises on purpose."""


class ArgumentError(SeamlessW2vBertError, ValueError):
    """An argument has a value that it cannot have, such as a layer of no number."""


class AudioError(SeamlessW2vBertError):
    """An input is not audio, or not audio that has an embedding."""


class CheckpointError(SeamlessW2vBertError):
    """A checkpoint is missing, unreadable, unsafe, or of another architecture."""


class DumpError(SeamlessW2vBertError):
    """An embedding dump is missing, inconsistent, or cannot be written."""


class StackError(SeamlessW2vBertError):
    """No usable fairseq2 is installed."""
