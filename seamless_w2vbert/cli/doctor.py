"""``seamless-w2vbert doctor``: what is installed, what works, and what to do if not.

Comes in: nothing. Goes out: a report on stdout. It imports nothing that may be broken
without catching what comes of it, and so runs where fairseq2 does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import typer

from seamless_w2vbert import __version__, stack
from seamless_w2vbert.errors import StackError


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    """What was looked at."""

    state: str
    """What was found."""

    advice: str | None = None
    """What to do, where something is wrong; None where all is well."""


def doctor() -> None:
    """Say what is installed, what works, and what to install where it does not.

    The exit code is 1 if the package cannot embed audio here.
    """
    findings = [check() for check in _CHECKS]
    width = max(len(finding.subject) for finding in findings)

    for finding in findings:
        mark = "ok" if finding.advice is None else "!!"
        print(f"{mark}  {finding.subject:<{width}}  {finding.state}")
        if finding.advice is not None:
            print(f"    {'':<{width}}  -> {finding.advice}")

    if any(finding.advice is not None for finding in findings):
        raise typer.Exit(1)


def _package() -> Finding:
    return Finding(
        "seamless_w2vbert",
        f"{__version__} on Python {platform.python_version()}, {platform.platform()}",
    )


def _torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except Exception as ex:
        return Finding("torch", f"cannot be imported: {_line(ex)}", _REINSTALL)

    return Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _devices() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except Exception:
        return Finding("devices", "unknown without torch")

    names = [
        f"cuda:{index} {torch.cuda.get_device_name(index)}"
        for index in range(
            torch.cuda.device_count() if torch.cuda.is_available() else 0
        )
    ]

    return Finding("devices", ", ".join(["cpu", *names]))


def _libsndfile() -> Finding:
    library = stack.preload_libsndfile()

    try:
        soundfile = importlib.import_module("soundfile")
    except Exception as ex:
        return Finding(
            "libsndfile",
            f"soundfile cannot be imported: {_line(ex)}",
            "pip install --force-reinstall soundfile",
        )

    home = f"from {library}" if library else "from the system"

    return Finding("libsndfile", f"{soundfile.__libsndfile_version__} {home}")


def _fairseq2() -> Finding:
    try:
        generation = stack.fairseq2_generation()
    except StackError as ex:
        return Finding("fairseq2", "no usable version", str(ex))

    installed = version("fairseq2")

    try:
        name = stack.load().NAME
    except StackError as ex:
        return Finding("fairseq2", f"{installed} is broken", _advice(ex, generation))
    except Exception as ex:
        return Finding(
            "fairseq2",
            f"{installed} is broken: {_line(ex)}",
            _advice(ex, generation),
        )

    return Finding("fairseq2", f"{installed}, the {name!r} stack")


def _advice(ex: BaseException, generation: str) -> str:
    text = str(ex)

    if "libsndfile" in text:
        return "pip install --force-reinstall soundfile (its wheel carries libsndfile)"
    if "numpy" in text.lower() and generation == "0.2":
        return "pip install 'numpy<2' (fairseq2 0.2 was built against NumPy 1)"
    if "torch" in text.lower():
        return f"fairseq2n pins its torch exactly; {_REINSTALL} ({_line(ex)})"

    return f"{_REINSTALL} ({_line(ex)})"


def _seamless_communication() -> Finding:
    subject = "seamless_communication"

    if importlib.util.find_spec(subject) is None:
        return Finding(subject, "not installed (optional, with fairseq2 0.2 only)")

    try:
        importlib.import_module(f"{subject}.models.conformer_shaw")
    except Exception as ex:
        return Finding(subject, f"is there but cannot be imported: {_line(ex)}")

    return Finding(subject, "importable: its builder makes the models")


def _transformers() -> Finding:
    try:
        return Finding("transformers", version("transformers"))
    except PackageNotFoundError:
        return Finding(
            "transformers", "not installed (optional: seamless_w2vbert[transformers])"
        )


def _dtype() -> Finding:
    """Choose a dtype as ``dtype="auto"`` does, with ``tiny-random``."""
    subject = "dtype auto"

    try:
        from seamless_w2vbert import precision
        from seamless_w2vbert.model import TINY_RANDOM, load_conformer_shaw_model

        torch = importlib.import_module("torch")
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        choices = []

        for device in map(torch.device, devices):
            load = partial(load_conformer_shaw_model, TINY_RANDOM, device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _, choice = precision.choose(load, device)
            name = str(choice.dtype).removeprefix("torch.")
            choices.append(f"{name} on {device} ({choice.reason})")
    except Exception as ex:
        return Finding(
            subject, f"cannot be chosen: {_line(ex)}", "name one: --dtype float32"
        )

    return Finding(subject, "; ".join(choices))


def _main_job() -> Finding:
    """Embed a second of noise with ``tiny-random``."""
    subject = "embedding"

    try:
        import numpy as np

        from seamless_w2vbert.pipeline import SpeechEncoderPipeline

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")

        noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
        output = pipeline(noise, sampling_rate=16_000)
    except Exception as ex:
        return Finding(subject, f"fails: {_line(ex)}", "mend what is marked !! above")

    frames = int(output.lengths[0])

    return Finding(subject, f"works: a second of noise made {frames} frames")


def _line(ex: BaseException) -> str:
    lines = [line for line in str(ex).splitlines() if line.strip()]
    return f"{type(ex).__name__}: {lines[0] if lines else 'no message'}"


_REINSTALL = (
    f"{sys.executable} -m pip install --force-reinstall seamless_w2vbert in a fresh "
    "environment"
)

_CHECKS: list[Callable[[], Finding]] = [
    _package,
    _fairseq2,
    _torch,
    _devices,
    _libsndfile,
    _seamless_communication,
    _transformers,
    _main_job,
    _dtype,
]
