from __future__ import annotations

import json

import numpy as np
import pytest
from command import run
from reference import SPEECH, write_transformers


def test_compare_prints_every_stage_and_a_sentence():
    result = run("compare", SPEECH)

    assert result.returncode == 0
    for stage in ("waveform", "fbank", "pad", "frontend", "layer 3", "final"):
        assert any(
            line.strip().startswith(stage) and line.split()[-1] == "ok"
            for line in result.stdout.splitlines()
        )
    assert "Within tolerance at every stage" in result.stdout


def test_compare_exits_with_1_where_something_differs(
    small_model, small_architecture, tmp_path
):
    for name in ("a", "b"):
        write_transformers(small_model, small_architecture, tmp_path / name)
        small_model.encoder.layers[1].layer_norm.bias.data += 0.5
    small_model.encoder.layers[1].layer_norm.bias.data -= 1.0
    report = tmp_path / "report.html"

    result = run(
        "compare",
        SPEECH,
        *("--model", tmp_path / "a"),
        *("--against", f"transformers:{tmp_path / 'b'}"),
        *("--report", report, "--json"),
    )
    read = json.loads(result.stdout)

    assert result.returncode == 1
    assert read["first"] == "layer 2"
    assert read["sentence"] in report.read_text()

    result = run(
        "compare",
        SPEECH,
        *("--model", tmp_path / "a", "--against", tmp_path / "b"),
        *("--tolerance", "layer=10", "--tolerance", "final=10"),
    )
    assert result.returncode == 0


def test_compare_takes_what_embed_has_written(tmp_path):
    stored = tmp_path / "stored.npz"
    assert run("embed", SPEECH, "--layers", "1,3", "--output", stored).returncode == 0
    assert run("compare", SPEECH, "--against", stored).returncode == 0

    arrays = dict(np.load(stored))
    arrays[f"{SPEECH}#3"][5, 7] = np.nan
    np.savez(stored, **arrays)
    result = run("compare", SPEECH, "--against", stored)
    assert result.returncode == 1
    assert "frame 5 (0.10 s) dim 7" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        ([SPEECH, "--tolerance", "mel=1"], 2, "'mel=1' is neither a factor"),
        ([SPEECH, "--report", "page.pdf"], 2, "use .html"),
        ([SPEECH, "--report", "no/such/page.html"], 2, "there is no folder"),
        ([SPEECH, "--against", "no_such_model"], 1, "no_such_model: is neither"),
        ([SPEECH, "--against", "transformers:no_such"], 1, "Transformers cannot load"),
        ([SPEECH, "--against", "seamless:no_such"], 1, "seamless_communication"),
        (["gone.wav"], 1, "gone.wav: cannot be read"),
    ],
)
def test_compare_says_in_a_line_what_is_wrong(arguments, code, message):
    result = run("compare", *arguments, HF_HUB_OFFLINE="1")  # else it tries for long
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
