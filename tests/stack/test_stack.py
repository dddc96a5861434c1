from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from seamless_w2vbert import stack


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_stack_is_that_of_the_installed_fairseq2():
    names = {"0.2": "seamless", "0.8": "current"}
    generation = ".".join(version("fairseq2").split(".")[:2])
    assert stack.fairseq2_generation() == generation
    assert names[generation] == stack.load().NAME


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_only_libsndfile_in_the_process_is_that_of_the_wheel():
    """So no system package is needed, whether or not the system has one."""
    program = """
from seamless_w2vbert import stack
stack.load().AudioDecoder
from seamless_w2vbert.audio import decode
maps = open("/proc/self/maps").read().splitlines()
print(*sorted({line.split()[-1] for line in maps if "libsndfile" in line}))
"""
    result = run(program)
    (library,) = result.stdout.split()
    assert "_soundfile_data" in library


def test_importing_the_package_imports_neither_torch_nor_fairseq2():
    program = """
import sys, seamless_w2vbert, seamless_w2vbert.cli
print(sorted({"torch", "fairseq2", "transformers", "numpy"} & set(sys.modules)))
"""
    assert run(program).stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    import seamless_w2vbert

    for name in seamless_w2vbert.__all__:
        assert getattr(seamless_w2vbert, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        seamless_w2vbert.no_such_name  # noqa: B018


def test_only_the_stack_imports_fairseq2():
    from pathlib import Path

    import seamless_w2vbert

    root = Path(seamless_w2vbert.__file__).parent
    importers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"^\s*(from|import) fairseq2[\s.]", path.read_text(), re.M)
    }
    assert importers == {"stack/current.py", "stack/seamless.py"}
