"""Runs the package in processes of its own: its commands, and its memory measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("seamless-w2vbert")


def run(*arguments, stdin: str = "", cwd=None, **environment):
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "160", **environment},
    )


def peak_of_loading(path) -> tuple[float, float]:
    """Peak memory, in MB, that loading and running cost in a process of its own."""
    program = f"""
import resource, sys, warnings
import numpy as np, torch
warnings.simplefilter("ignore")
from seamless_w2vbert import SpeechEncoderPipeline, load_conformer_shaw_model
noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
SpeechEncoderPipeline.from_pretrained("tiny-random")(noise)
start = peak()
model = load_conformer_shaw_model({str(path)!r})
loaded = peak()
SpeechEncoderPipeline(model)(noise)
print(loaded - start, peak() - start)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded, run = map(float, result.stdout.split()[-2:])
    return loaded, run
