from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from command import COMMAND, run
from reference import SPEECH
from safetensors.numpy import load_file


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [Path(shutil.copy(SPEECH, folder / name)) for name in ("a.flac", "b.flac")]


def test_embed_prints_a_row_for_each_file_and_layer(two_files, tiny):
    result = run("embed", *two_files, "--layers", "1,3")

    assert result.returncode == 0
    assert "warning: tiny-random is untrained" in result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if ".flac" in line]
    assert [(Path(row[0]).name, row[2]) for row in rows] == [
        ("a.flac", "1"),
        ("a.flac", "3"),
        ("b.flac", "1"),
        ("b.flac", "3"),
    ]
    hidden = tiny(SPEECH, layers=(1, 3)).hidden_states
    for row in rows:
        norm = hidden[int(row[2])][0].norm(dim=-1).mean()
        assert row[1] == "5.56"
        assert row[3:5] == ["277", "128"]
        assert float(row[5]) == pytest.approx(float(norm), abs=2e-3)


def test_embed_writes_every_array_under_its_name(two_files, tmp_path, tiny):
    expected = tiny(SPEECH, layers=(0, 3)).hidden_states

    for name in ("out.npz", "out.safetensors"):
        path = tmp_path / name
        result = run("embed", *two_files, "--layers", "0,-1", "--output", path)
        assert result.returncode == 0
        arrays = np.load(path) if path.suffix == ".npz" else load_file(path)

        assert set(arrays) == {f"{f}#{n}" for f in two_files for n in (0, 3)}
        for file in two_files:
            for layer in (0, 3):
                np.testing.assert_allclose(
                    arrays[f"{file}#{layer}"], expected[layer][0], atol=1e-5
                )


def test_embed_pools_and_writes_one_array(two_files, tmp_path, tiny):
    result = run(
        "embed", two_files[0], "--pool", "mean", "--output", tmp_path / "one.npy"
    )
    assert result.returncode == 0
    expected = tiny(SPEECH).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(np.load(tmp_path / "one.npy"), expected, atol=1e-5)


def test_embed_reads_paths_from_stdin(two_files, tmp_path):
    path = tmp_path / "out.npz"
    listing = "".join(f"{file}\n" for file in two_files) + "\n"
    assert run("embed", "-", "--output", path, stdin=listing).returncode == 0
    assert set(np.load(path)) == set(map(str, two_files))


def test_embed_keeps_odd_names(tmp_path):
    shutil.copy(SPEECH, tmp_path / "file")
    assert run("embed", "file", "--output", "o.npz", cwd=tmp_path).returncode == 0
    assert list(np.load(tmp_path / "o.npz")) == ["file"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_embed_writes_half_precision(two_files, tmp_path, dtype):
    path = tmp_path / "out.npz"
    result = run("embed", two_files[0], "--dtype", dtype, "--output", path)
    assert result.returncode == 0
    (array,) = np.load(path).values()
    # NumPy has no bfloat16.
    assert array.dtype == (np.float16 if dtype == "float16" else np.float32)


def test_embed_names_bad_files_and_embeds_the_rest(two_files, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio")
    out = tmp_path / "out.npz"
    result = run("embed", bad, two_files[0], tmp_path / "gone.wav", "--output", out)

    assert result.returncode == 1
    assert "bad.wav: cannot be decoded" in result.stderr
    assert "gone.wav: cannot be read" in result.stderr
    assert "2 of 3 files failed" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(np.load(out)) == [str(two_files[0])]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["-"], 2, "no audio file"),
        (["a.wav", "--layers", "four"], 2, "'four' is not a list"),
        (["a.wav", "--layers", "9"], 2, "Layer 9 does not exist"),
        (["a.wav", "--device", "tpux"], 2, "tpux"),
        (["a.wav", "--dtype", "int8"], 2, "int8"),
        (["a.wav", "--output", "out.pkl"], 2, "use .npz, .npy or .safetensors"),
        (["a.wav", "b.wav", "--output", "out.npy"], 2, "holds one array"),
        (["a.wav", "--output", "no/such/out.npz"], 2, "there is no folder"),
        (["a.wav", "--model", "no_such_model"], 1, "no_such_model: is neither"),
    ],
)
def test_embed_says_in_a_line_what_is_wrong(arguments, code, message):
    result = run("embed", *arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there_is_named():
    result = run("embed", SPEECH, "--device", "cuda")
    assert result.returncode == 2
    assert "Device 'cuda' cannot be used here" in result.stderr


def test_the_version_is_that_of_the_package():
    import seamless_w2vbert

    assert run("--version").stdout.strip() == seamless_w2vbert.__version__


def test_doctor_reports_and_embeds():
    result = run("doctor")
    assert result.returncode == 0
    for subject in ("fairseq2", "torch", "libsndfile", "devices", "transformers"):
        assert f"ok  {subject}" in result.stdout
    assert "seamless_communication" in result.stdout
    assert "a second of noise made 49 frames" in result.stdout
    assert re.search(
        r"ok  dtype auto +\w+ on cpu \(.* times as fast as float32", result.stdout
    )


def test_embed_chooses_a_dtype_where_it_is_asked_to(tmp_path):
    path = tmp_path / "out.npy"
    result = run("embed", SPEECH, "--dtype", "auto", "--output", path)
    assert result.returncode == 0, result.stderr
    assert re.search("computing in (float32|bfloat16)", result.stderr)
    assert np.load(path).shape == (277, 128)


@pytest.mark.parametrize(
    ("module", "error", "advice"),
    [
        (
            "fairseq2",
            "OSError('libsndfile is not found! Use your system package manager')",
            "pip install --force-reinstall soundfile",
        ),
        ("fairseq2", "ImportError('fairseq2n requires torch 2.9.1')", "pins its torch"),
        ("torch", "ImportError('libtorch.so: cannot open')", "--force-reinstall"),
        ("soundfile", "OSError('no libsndfile')", "--force-reinstall soundfile"),
    ],
)
def test_doctor_works_where_a_library_does_not(tmp_path, module, error, advice):
    """A library of that name that fails to import stands before the real one."""
    (tmp_path / f"{module}.py").write_text(f"raise {error}\n")
    result = run("doctor", PYTHONPATH=str(tmp_path))

    assert result.returncode == 1
    assert f"!!  {module if module != 'soundfile' else 'libsndfile'}" in result.stdout
    assert error.split("'")[1] in result.stdout
    assert advice in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_arrays_are_written_where_nobody_reads_the_table(tmp_path):
    path = tmp_path / "out.npz"
    command = f"{COMMAND} embed {SPEECH} --output {path} > /dev/full"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "No space left on device" in result.stderr
    assert list(np.load(path)) == [str(SPEECH)]

    path.unlink()
    result = subprocess.run(
        f"{COMMAND} embed {SPEECH} --output {path} | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert path.exists()


def test_names_of_any_bytes_are_printed_and_written(tmp_path):
    name = os.fsdecode(b"bad\xff.flac")
    shutil.copy(SPEECH, tmp_path / name)
    result = run("embed", name, "--output", "o.npz", cwd=tmp_path)
    assert result.returncode == 0
    (key,) = np.load(tmp_path / "o.npz")
    assert key == "bad\\udcff.flac"
    assert key in result.stdout

    result = run("embed", "no\nsuch\x1b.wav", cwd=tmp_path)
    assert result.returncode == 1
    assert "no\\nsuch\\x1b.wav: cannot be read" in result.stderr


def test_safetensors_that_cannot_be_written_say_so_in_a_line(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    result = run("embed", SPEECH, "--output", tmp_path / "folder.safetensors")
    assert result.returncode == 1
    assert "folder.safetensors: cannot be written" in result.stderr
    assert "Traceback" not in result.stderr

    shutil.copy(SPEECH, tmp_path / "__metadata__")
    result = run("embed", "__metadata__", "--output", "o.safetensors", cwd=tmp_path)
    assert result.returncode == 2
    assert "use .npz" in result.stderr


def test_usage_errors_are_one_line():
    for arguments in (
        ["embed"],
        ["embed", "a", "--dtype", "int8"],
        ["no-such-command"],
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1
        assert result.stderr.startswith("seamless-w2vbert: ")


def test_without_a_command_the_help_is_shown():
    assert "embed" in run("--help").stdout
    result = run()
    assert result.returncode == 2
    assert "Usage" in result.stdout + result.stderr
