from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import transformers_config, write_fairseq, write_transformers
from transformers import AutoModel, SeamlessM4Tv2Config, Wav2Vec2BertForCTC

from seamless_w2vbert.cli.convert import grouped

COMMAND = Path(sys.executable).with_name("seamless-w2vbert")
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


def run(*arguments, command=(COMMAND, "convert")):
    return subprocess.run(
        [str(part) for part in (*command, *arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )


def expand(line: str) -> set[str]:
    """Write out the braces of a line as a shell would, ranges included."""

    def choices(part: str) -> list[str]:
        if not part.startswith("{"):
            return [part]
        items = []
        for item in part[1:-1].split(","):
            first, dash, last = item.partition("-")
            items += map(str, range(int(first), int(last) + 1)) if dash else [item]
        return items

    parts = [choices(part) for part in re.split(r"(\{[^}]*\})", line)]
    return {"".join(choice) for choice in itertools.product(*parts)}


def names_below(heading: str, output: str) -> set[str]:
    lines = iter(output.splitlines())
    next(line for line in lines if heading in line)
    listed = itertools.takewhile(lambda line: line.startswith("  "), lines)
    return {name for line in listed for name in expand(line.strip())}


@pytest.fixture
def fairseq_file(small_model, tmp_path):
    write_fairseq(small_model, tmp_path / "fairseq.pt")
    return tmp_path / "fairseq.pt"


@pytest.fixture
def folder(small_model, small_architecture, tmp_path):
    write_transformers(small_model, small_architecture, tmp_path / "folder")
    return tmp_path / "folder"


def test_convert_says_what_it_dropped(fairseq_file, tmp_path):
    result = run(fairseq_file, tmp_path / "out", "--to", "transformers")

    assert (result.returncode, result.stderr) == (0, "")
    assert AutoModel.from_pretrained(tmp_path / "out").config.hidden_size == 48
    assert f"{fairseq_file} (fairseq)" in result.stdout
    assert f"-> {tmp_path / 'out'} (transformers)" in result.stdout
    dropped = names_below("dropped", result.stdout)
    assert f"{len(dropped)} tensors dropped" in result.stdout
    assert {"quantizer.vars", "project_q.bias", "mlm_proj.weight"} <= dropped
    assert "initialised" not in result.stdout


def test_convert_says_what_it_initialised_and_dropped(small_architecture, tmp_path):
    torch.manual_seed(0)
    config = transformers_config(small_architecture, vocab_size=7, add_adapter=True)
    ctc = Wav2Vec2BertForCTC(config)
    ctc.save_pretrained(tmp_path / "ctc")
    (tmp_path / "ctc" / "vocab.json").write_text("{}")

    result = run(tmp_path / "ctc", tmp_path / "out.pt", "--to", "fairseq2")

    assert (result.returncode, result.stderr) == (0, "")
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    made_up = names_below("initialised, untrained", result.stdout)
    assert made_up == set(content["initialised"])
    assert f"{len(made_up)} tensors initialised" in result.stdout
    assert names_below("dropped", result.stdout) == {
        name
        for name in ctc.state_dict()
        if name.startswith(("lm_head.", "wav2vec2_bert.adapter."))
    }
    assert "files left behind: vocab.json" in result.stdout


def test_the_dtype_and_the_shards_are_those_asked_for(folder, tmp_path):
    options = ("--dtype", "bfloat16", "--max-shard-size", "100KB")
    result = run(folder, tmp_path / "out", "--to", "transformers", *options)

    assert result.returncode == 0
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 1
    model = AutoModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_failures_are_one_line_that_names_the_file(fairseq_file, tmp_path):
    (tmp_path / "old.pt").write_bytes(b"precious")
    for arguments, code, message in [
        ((fairseq_file, "old.pt"), 1, "old.pt: exists; pass --force"),
        ((fairseq_file, "fairseq.pt", "--force"), 1, "is what is to be read"),
        (("gone.pt", "new.pt"), 1, "gone.pt: there is no such file"),
        ((fairseq_file, "new"), 2, "new: fairseq2's format is a file"),
        ((fairseq_file, "new.pt", "--max-shard-size", "big"), 2, "'big' is no size"),
    ]:
        src, dst, *options = arguments
        result = run(tmp_path / src, tmp_path / dst, "--to", "fairseq2", *options)
        assert result.returncode == code
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""

    assert run(fairseq_file, tmp_path / "out", "--to", "onnx").returncode == 2
    assert (tmp_path / "old.pt").read_bytes() == b"precious"
    again = (fairseq_file, tmp_path / "old.pt", "--to", "fairseq2", "--force")
    assert run(*again).returncode == 0


def test_the_script_converts_there_and_back(fairseq_file, tmp_path):
    script = (sys.executable, SCRIPT)

    result = run(fairseq_file, tmp_path / "out", command=script)
    assert "dropped: quantizer.vars" in result.stdout
    result = run(tmp_path / "out", tmp_path / "back.pt", command=script)
    assert "initialised, untrained: quantizer.entries" in result.stdout
    result = run(tmp_path / "out", tmp_path / "back.pt", command=script)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{tmp_path / 'back.pt'}: exists")


def test_thousands_of_names_take_few_lines():
    from transformers import SeamlessM4Tv2ForSpeechToText

    with torch.device("meta"):
        config = SeamlessM4Tv2Config(hidden_size=32)
        names = set(SeamlessM4Tv2ForSpeechToText(config).state_dict())

    lines = grouped(names)

    assert len(lines) < len(names) / 20
    assert set().union(*map(expand, lines)) == names
    assert "text_decoder.layers.{0-23}.ffn.fc1.{bias,weight}" in lines


PARTS = st.sampled_from(["encoder", "layers", "0", "1", "2", "12", "w_1", "a", "7b"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(st.sets(NAMES, max_size=30))
def test_grouping_loses_and_invents_no_name(names):
    expanded = [name for line in grouped(sorted(names)) for name in expand(line)]
    assert sorted(expanded) == sorted(names)
