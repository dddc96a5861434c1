from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import SPEECH, read_mono_16k

from seamless_w2vbert.audio import Clip, decode, inspect
from seamless_w2vbert.dumping.sources import Utterance, open_source
from seamless_w2vbert.errors import ArgumentError, AudioError, DumpError


def signal(seed: int, samples: int = 8000) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.1 * random.standard_normal(samples)).astype(np.float32)


def write(path: Path, seed: int = 0, samples: int = 8000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"format": "WAV", "subtype": "FLOAT"} if path.suffix == ".wav" else {}
    soundfile.write(path, signal(seed, samples), 16000, **kind)
    return path


def ids(source) -> list[str]:
    return [utterance.id for utterance in source]


def samples(utterance: Utterance) -> np.ndarray:
    """What is decoded of an utterance that went to another process."""
    return decode(pickle.loads(pickle.dumps(utterance.audio))).samples.numpy()


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """Three recordings, a.wav of seed 1, b c.wav of seed 2, ü.wav of seed 3."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b c", "ü"), start=1):
        write(tmp_path / "audio" / f"{name}.wav", seed)
    return tmp_path


@pytest.fixture
def memory():
    """fsspec's filesystem in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def upload(memory, folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe_file(
                f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes()
            )


# -- folders and globs ---------------------------------------------------------------


def test_a_folder_gives_its_audio_files_sorted_by_their_relative_path(tmp_path):
    names = ["b/2.flac", "b/1.wav", "a.wav", "a.flac", "c/d/e/3.OGG", "b.wav"]
    for name in names:
        write(tmp_path / name)
    for name in ("a.txt", ".hidden.wav", ".git/x.wav", "notes", "b/._1.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    source = open_source(tmp_path)

    expected = ["a.flac", "a.wav", "b/1.wav", "b/2.flac", "b.wav", "c/d/e/3.OGG"]
    assert ids(source) == expected
    assert ids(source) == expected
    assert [u.audio for u in source] == [str(tmp_path / name) for name in expected]
    assert (source.root, source.streaming) == (str(tmp_path), False)
    assert source.column_types == {}


def test_the_order_of_a_folder_is_not_that_of_the_file_system(tmp_path, monkeypatch):
    for name in "gdbface":
        write(tmp_path / name / f"{name}.wav")
    expected = [f"{name}/{name}.wav" for name in "abcdefg"]
    assert ids(open_source(tmp_path)) == expected


def test_ids_of_a_folder_do_not_depend_on_how_it_is_named(corpus):
    expected = ["audio/a.wav", "audio/b c.wav", "audio/ü.wav"]
    assert ids(open_source(".")) == expected
    assert ids(open_source(corpus)) == expected
    assert ids(open_source(f"{corpus}/")) == expected


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "in" / "a" / "x.wav")
    write(tmp_path / "elsewhere" / "y.wav")
    (tmp_path / "in" / "a" / "up").symlink_to("..")
    (tmp_path / "in" / "self").symlink_to("self")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "elsewhere")

    assert ids(open_source(tmp_path / "in")) == ["a/x.wav", "other/y.wav"]


def test_a_link_to_nowhere_is_listed_and_fails_when_decoded(tmp_path):
    (tmp_path / "gone.wav").symlink_to("nowhere.wav")
    (utterance,) = open_source(tmp_path)
    with pytest.raises(AudioError, match="No such file"):
        decode(utterance.audio)


def test_pipes_are_not_taken_for_files(tmp_path):
    write(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "b.wav")
    assert ids(open_source(tmp_path)) == ["a.wav"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "b").mkdir(mode=0)
    with pytest.raises(DumpError, match=r"b: cannot be read: Permission denied"):
        ids(open_source(tmp_path))


def test_a_folder_that_the_system_refuses_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a.wav")
    write(tmp_path / "b" / "c.wav")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DumpError, match=r"b: cannot be read: Permission denied"):
        ids(open_source(tmp_path))


def test_names_that_are_no_utf_8_have_ids_that_can_be_stored(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    with open(name, "wb") as file:
        file.write(write(tmp_path / "x" / "a.wav").read_bytes())
    (tmp_path / "x" / "a.wav").unlink()

    (utterance,) = open_source(tmp_path)

    assert utterance.id.encode("utf-8")
    assert utterance.source.encode("utf-8")
    assert len(samples(utterance)) == 8000


def test_a_name_of_two_lines_is_refused(tmp_path):
    write(tmp_path / "a\nb.wav")
    with pytest.raises(DumpError, match="line break"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        "data/**/*.flac",
        "data/*.flac",
        "data/*/*.flac",
        "data/**/x/*.wav",
        "data/?/[ab].flac",
        "da*/**/*.wav",
        "data/**",
    ],
)
def test_a_glob_finds_what_the_shells_and_pythons_find(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for name in ("a.flac", "x/a.flac", "x/y/b.flac", "y/x/c.wav", "x/b.wav", "z/c.wav"):
        write(tmp_path / "data" / name)

    expected = {os.fspath(path) for path in Path().glob(pattern) if path.is_file()}
    if pattern.endswith("**"):  # pathlib's gave folders alone before Python 3.13
        expected = {str(path) for path in Path("data").rglob("*") if path.is_file()}

    found = list(open_source(pattern))

    assert {utterance.audio for utterance in found} == expected
    assert len(found) == len(expected) > 0
    if pattern.startswith("data/"):
        assert {f"data/{u.id}" for u in found} == expected


def test_a_folder_whose_name_has_wildcards_is_that_folder(tmp_path):
    write(tmp_path / "take [1]" / "a.wav")
    write(tmp_path / "take 1" / "b.wav")
    assert ids(open_source(tmp_path / "take [1]")) == ["a.wav"]


def test_an_audio_file_is_a_source_of_one(corpus):
    (utterance,) = open_source("audio/a.wav")
    assert utterance.id == utterance.audio == "audio/a.wav"


# -- Python objects ------------------------------------------------------------------


def test_a_list_holds_paths_pairs_and_utterances(corpus):
    data = (corpus / "audio" / "a.wav").read_bytes()
    source = open_source(
        [
            "audio/a.wav",
            Path("audio/b c.wav"),
            ("x", data),
            (7, signal(3)),
            ("cut", Clip("audio/ü.wav", 0.1, 0.2)),
            Utterance("u", "audio/a.wav", "here", columns={"text": "hi", "n": 1}),
        ]
    )

    assert ids(source) == ["audio/a.wav", "audio/b c.wav", "x", "7", "cut", "u"]
    lengths = [len(samples(utterance)) for utterance in source]
    assert lengths == [8000, 8000, 8000, 8000, 1600, 8000]
    cut, last = list(source)[4:]
    assert (cut.source, cut.start, cut.end) == ("audio/ü.wav", 0.1, 0.2)
    assert (last.source, last.columns) == ("here", {})


def test_columns_of_utterances_are_carried(corpus):
    items = [Utterance("u", "audio/a.wav", "here", columns={"text": "hi", "n": 1})]
    source = open_source(items, columns=["text"])
    assert [utterance.columns for utterance in source] == [{"text": "hi"}]
    assert source.column_types == {"text": pa.string()}

    with pytest.raises(ArgumentError, match="no column 'speaker'"):
        open_source(items, columns=["speaker"])


def test_a_function_that_returns_a_new_iterator_is_taken(corpus):
    source = open_source(lambda: (f"audio/{name}.wav" for name in ("a", "ü")))
    assert ids(source) == ["audio/a.wav", "audio/ü.wav"]
    assert ids(source) == ["audio/a.wav", "audio/ü.wav"]


def test_a_source_is_a_source(corpus):
    source = open_source("audio")
    assert open_source(source) is source


ONCE = iter(["a.wav"])


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ((path for path in ["a.wav"]), "only once"),
        (iter(["a.wav"]), "only once"),
        ((lambda: ONCE), "only once"),
        ({"a": "a.wav"}, "pairs"),
        ({"a.wav"}, "no list"),
        (b"RIFF", "one input"),
        (np.zeros(800), "one input"),
        (3, "no source"),
        (None, "no source"),
        ([3], "item 0"),
        ([("a", "b", "c")], "item 0"),
        ([("a", io.BytesIO(b"RIFF"))], "only once"),
    ],
)
def test_what_cannot_be_read_again_or_has_no_order_is_refused(items, reason):
    with pytest.raises(ArgumentError, match=reason):
        open_source(items)


@pytest.mark.parametrize("id", ["", " ", "a\nb", "a\0b", None, 1.5, True])
def test_an_id_that_is_none_is_refused(id):
    with pytest.raises(DumpError, match=r"item 0.* id"):
        open_source([(id, "a.wav")])


# -- lists ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l.txt", "l.lst", "L.TXT", "l.txt.gz"])
def test_a_list_of_paths_is_relative_to_the_working_directory(corpus, name):
    text = "\ufeffaudio/a.wav\r\naudio/b c.wav\r\n\r\naudio/ü.wav\r\n  \r\n\n"
    path = corpus / "lists" / name
    path.parent.mkdir()
    path.write_bytes(
        gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    )

    source = open_source(path)

    assert ids(source) == ["audio/a.wav", "audio/b c.wav", "audio/ü.wav"]
    for seed, utterance in enumerate(source, start=1):
        np.testing.assert_array_equal(samples(utterance), signal(seed))


@pytest.mark.parametrize("binary", [True, False])
def test_paths_on_standard_input_can_be_iterated_again(corpus, binary):
    text = "audio/a.wav\naudio/ü.wav\n"
    stdin = io.StringIO(text)
    if binary:
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    source = open_source("-", stdin=stdin)

    assert ids(source) == ids(source) == ["audio/a.wav", "audio/ü.wav"]
    assert len(samples(list(source)[1])) == 8000


def test_nothing_on_standard_input_is_an_error(monkeypatch):
    with pytest.raises(DumpError, match="no audio"):
        open_source("-", stdin=io.StringIO("\n"))
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ArgumentError, match="standard input"):
        open_source("-")


def test_a_fairseq_manifest_has_a_root_and_counts(corpus):
    manifest = corpus / "train.tsv"
    manifest.write_text(f"{corpus}/audio\na.wav\t8000\nb c.wav\t8000\n\n")

    source = open_source(manifest)

    assert ids(source) == ["a.wav", "b c.wav"]
    assert source.root == f"{corpus}/audio"
    for seed, utterance in enumerate(source, start=1):
        assert utterance.samples == 8000
        np.testing.assert_array_equal(samples(utterance), signal(seed))


@pytest.mark.parametrize("line", ["a.wav 8000", "a.wav\tlong", "\t8000", "a.wav\t-1"])
def test_a_line_that_is_not_fairseqs_is_named(corpus, line):
    (corpus / "t.tsv").write_text(f"{corpus}\naudio/a.wav\t8000\n{line}\n")
    source = open_source("t.tsv")
    with pytest.raises(DumpError, match=r"t\.tsv, line 3: expected path<TAB>number"):
        list(source)


# -- manifests with columns ----------------------------------------------------------


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows by the standard library or pyarrow, which read none of them here."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    text = io.StringIO(newline="")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if kind in ("jsonl", "json"):
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind == "csv":
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
            text.write("\t".join(map(str, row.values())) + "\n")
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


TABLES = ["m.csv", "m.csv.gz", "m.tsv", "m.jsonl", "m.jsonl.gz", "m.json", "m.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_gives_paths_relative_to_itself_ids_clips_and_columns(corpus, name):
    rows = [
        {"id": "one", "audio": "a.wav", "start": 0.125, "end": 0.25, "text": 'hé, "x"'},
        {"id": "two", "audio": "b c.wav", "start": 0.25, "end": 0.5, "text": "y"},
        {
            "id": "3",
            "audio": str(corpus / "audio/ü.wav"),
            "start": 0.0,
            "end": 0.1,
            "text": "z",
        },
    ]
    path = write_table(corpus / "audio" / name, rows)

    source = open_source(path, columns=["text"])

    assert ids(source) == ids(source) == ["one", "two", "3"]
    assert source.column_types == {"text": pa.string()}
    assert not source.streaming
    for seed, (row, utterance) in enumerate(zip(rows, source, strict=True), start=1):
        assert (utterance.start, utterance.end) == (row["start"], row["end"])
        assert utterance.columns == {"text": row["text"]}
        assert utterance.source == str(corpus / "audio" / Path(row["audio"]).name)
        first, last = round(row["start"] * 16000), round(row["end"] * 16000)
        assert utterance.samples == last - first
        np.testing.assert_array_equal(samples(utterance), signal(seed)[first:last])


@pytest.mark.parametrize("name", TABLES)
def test_without_an_id_the_path_and_the_clip_are_the_id(corpus, name):
    rows = [{"path": "a.wav", "start": 0.1, "end": 0.2}, {"path": "a.wav"}]
    rows[1] |= {"start": 0.25, "end": 0.5 if name.startswith("m.tsv") else None}
    path = write_table(corpus / "audio" / name, rows)

    first, second = open_source(path, audio_column="path")

    assert first.id == "a.wav#0.1-0.2"
    if name != "m.tsv":
        assert second.id == "a.wav#0.25-"
        assert (second.start, second.end, second.samples) == (0.25, None, None)
        np.testing.assert_array_equal(samples(second), signal(1)[4000:])


@pytest.mark.parametrize("name", TABLES)
def test_a_row_without_audio_fails_alone(corpus, name):
    null = "" if "sv" in name else None
    rows = [{"id": "a", "audio": "a.wav"}, {"id": "b", "audio": null}]
    path = write_table(corpus / "audio" / name, rows)

    good, bad = open_source(path)

    assert (good.id, bad.id) == ("a", "b")
    with pytest.raises(AudioError, match="null"):
        decode(bad.audio)


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_is_named_with_those_there_are(corpus, name):
    path = write_table(corpus / name, [{"wav": "a.wav", "text": "x"}])

    with pytest.raises(ArgumentError, match=r"no column 'audio'.*are wav, text"):
        open_source(path)
    with pytest.raises(ArgumentError, match=r"no column 'speaker'; .* wav, text"):
        open_source(path, audio_column="wav", columns=["text", "speaker"])
    with pytest.raises(ArgumentError, match=r"no column 'key' for the id"):
        open_source(path, audio_column="wav", id_column="key")
    with pytest.raises(ArgumentError, match="audio itself"):
        open_source(path, audio_column="wav", columns=["wav"])


@pytest.mark.parametrize("name", TABLES)
def test_clips_by_duration_are_refused_rather_than_read_as_whole_files(corpus, name):
    path = write_table(corpus / name, [{"audio": "a.wav", "start": 1, "duration": 2}])
    with pytest.raises(ArgumentError, match="'start' and 'end', in seconds"):
        open_source(path)


@pytest.mark.parametrize("name", TABLES)
def test_clips_in_an_archive_are_relative_to_the_manifest(corpus, name):
    archive = corpus / "audio" / "clips.tar"
    with tarfile.open(archive, "w") as tar:
        for file in ("a.wav", "ü.wav"):
            tar.add(corpus / "audio" / file, file)
    with tarfile.open(archive) as tar:
        rows = [
            {"id": m.name, "audio": f"clips.tar:{m.offset_data}:{m.size}"} for m in tar
        ]
    path = write_table(corpus / "audio" / name, rows)

    first, second = open_source(path)

    assert first.source == f"{corpus}/audio/{rows[0]['audio']}"
    np.testing.assert_array_equal(samples(first), signal(1))
    np.testing.assert_array_equal(samples(second), signal(3))


CUT_SHORT = gzip.compress(b"audio\n" + b"a.wav\n" * 999, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", 'id,audio\n1,a.wav,x\n', "line 2: has 3 fields; expected 2"),
        ("m.csv", 'id,audio\n1,a.wav\n2\n', "line 3: has 1 fields; expected 2"),
        ("m.csv", 'id,audio\n1,"a.wav\n2,b.wav\n', "is not CSV"),
        ("m.csv", 'audio,audio\n1,a.wav\n', "same name"),
        ("m.csv", 'id,audio\n,a.wav\n', "line 2: the id is empty"),
        ("m.csv", 'audio,start,end\na.wav,x,2\n', "line 2: start is 'x'; expected sec"),
        ("m.csv", 'audio,start,end\na.wav,0,inf\n', "line 2: end is 'inf'"),
        ("m.tsv", 'id\taudio\n1\ta.wav\tx\n', "line 2: has 3 fields"),
        ("m.jsonl", '{"audio": "a.wav"}\n{"audio": \n', "line 2: expected a JSON obj"),
        ("m.jsonl", '{"audio": "a.wav"}\n["a.wav"]\n', "line 2: .*, not a list"),
        ("m.json", '[\n{"audio": "a.wav"}]\n', "line 1: .*jq"),
        ("m.json", '[{"audio": "a.wav"}]\n', "line 1: .*jq"),
        ("m.jsonl", '{"audio": 3}\n', "line 1: the audio is of type int"),
        ("m.jsonl", '{"audio": "a", "id": [1]}\n', "line 1: the id is of type list"),
        ("m.jsonl", '{"audio": "a", "start": true}\n', "line 1: start is True"),
        ("m.csv", b'audio\ncaf\xe9.wav\n', "line 2: is not UTF-8"),
        ("m.csv", 'audio\na.wav\n'.encode("utf-16"), "line 1: is not UTF-8"),
        ("m.csv.gz", CUT_SHORT, "truncated"),
        ("m.jsonl.gz", b'{"audio": "a.wav"}\n', "gzip"),
        ("m.parquet", b"PAR1 this is not it PAR1", "cannot be read as Parquet"),
        ("m.csv", "", "no column 'audio'|is empty"),
        ("m.tsv", "", "is empty"),
        ("m.jsonl", "\n\n", "is empty"),
        ("m.txt", "", "no audio"),
        ("m.csv", "id,audio\n\n", "no audio"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named_with_its_line(corpus, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (corpus / name).write_bytes(data)
    with pytest.raises((DumpError, ArgumentError), match=message) as error:
        list(open_source(name))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(name)


def test_a_csv_file_may_have_a_bom_quotes_line_breaks_and_large_fields(corpus):
    text = "x" * 300_000
    (corpus / "m.csv").write_bytes(
        '\ufeff"id",audio,text\r\n'
        '1,"audio/b c.wav","two\r\nlines, ""quoted"""\r\n'
        f"2,audio/a.wav,{text}\r\n\r\n\r\n".encode()
    )
    first, second = open_source("m.csv", columns=["text"])
    assert first.columns == {"text": 'two\r\nlines, "quoted"'}
    assert second.columns == {"text": text}
    np.testing.assert_array_equal(samples(first), signal(2))


def test_a_quote_in_a_tsv_file_is_a_character(corpus):
    (corpus / "m.tsv").write_text('id\taudio\ttext\n1\ta.wav\t"well\n2\tb.wav\tso"\n')
    source = open_source("m.tsv", columns=["text"])
    assert [u.columns["text"] for u in source] == ['"well', 'so"']


def test_a_tsv_file_of_the_audio_column_alone_is_no_fairseq_manifest(corpus):
    (corpus / "m.tsv").write_text("audio\naudio/a.wav\n")
    assert ids(open_source("m.tsv")) == ["audio/a.wav"]


def test_values_of_json_lines_are_carried_as_text(corpus):
    rows = [
        {"audio": "a.wav", "v": 3},
        {"audio": "b.wav", "v": None},
        {"audio": "c.wav"},
        {"audio": "d.wav", "v": ["ü", True]},
        {"audio": "e.wav", "v": "\ud800"},
    ]
    (corpus / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source("m.jsonl", columns=["v"])
    assert [u.columns["v"] for u in source] == [
        "3",
        None,
        None,
        '["ü", true]',
        "\\ud800",
    ]


@pytest.mark.parametrize("missing", ["", "nan", "NaN"])
def test_times_that_are_missing_mean_the_whole_file(corpus, missing):
    (corpus / "m.csv").write_text(f"audio,start,end\naudio/a.wav,{missing},{missing}\n")
    (utterance,) = open_source("m.csv")
    assert (utterance.id, utterance.start, utterance.end) == ("audio/a.wav", None, None)
    assert utterance.audio == "audio/a.wav"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        ).filter(lambda row: row[0].strip()),
        min_size=1,
    ),
    name=st.sampled_from(["m.csv", "m.jsonl", "m.parquet"]),
)
def test_any_text_comes_through_every_format(tmp_path, rows, name):
    path = write_table(
        tmp_path / name, [{"id": i, "audio": "a.wav", "text": t} for i, t in rows]
    )
    source = open_source(path, columns=["text"])
    assert [(u.id, u.columns["text"]) for u in source] == rows


# -- Parquet -------------------------------------------------------------------------


def test_a_parquet_file_may_hold_the_audio_and_typed_columns(corpus):
    data = (corpus / "audio" / "a.wav").read_bytes()
    audio = [
        {"bytes": data, "path": "a.wav"},
        {"bytes": None, "path": "audio/ü.wav"},
        None,
        {"bytes": None, "path": None},
    ]
    table = pa.table(
        {
            "audio": audio,
            "n": pa.array([1, None, 3, 4], pa.int16()),
            "s": pa.array(["a", "b", "a", "b"]).dictionary_encode(),
            "unused": [[1.5]] * 4,
        }
    )
    pq.write_table(table, "train.parquet")

    source = open_source("train.parquet", columns=["n", "s"])
    first, second, *nulls = source

    assert source.column_types == {"n": pa.int16(), "s": pa.string()}
    assert (first.id, first.source) == ("train.parquet:0", "train.parquet:0")
    assert (second.id, second.source) == ("audio/ü.wav", "audio/ü.wav")
    assert [utterance.id for utterance in nulls] == [
        "train.parquet:2",
        "train.parquet:3",
    ]
    assert [u.columns["n"] for u in source] == [1, None, 3, 4]
    np.testing.assert_array_equal(samples(first), signal(1))
    np.testing.assert_array_equal(samples(second), signal(3))
    for utterance in nulls:
        with pytest.raises(AudioError, match="null"):
            decode(utterance.audio)


def test_a_parquet_file_of_bytes_is_read_row_by_row(tmp_path):
    """One row group of 64 MB: only a few rows are in memory at a time."""
    noise = np.random.default_rng(0).bytes(1 << 20)
    table = pa.table({"audio": [noise] * 64, "id": range(64)})
    pq.write_table(
        table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1
    )
    del table
    pool = pa.default_memory_pool()
    pool.release_unused()
    before, peak = pool.bytes_allocated(), 0

    for number, utterance in enumerate(open_source(tmp_path / "a.parquet")):
        assert (utterance.id, utterance.audio) == (str(number), noise)
        peak = max(peak, pool.bytes_allocated() - before)

    assert number == 63
    assert peak < 32 << 20


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_parquet_files_of_other_libraries_are_read(corpus, library):
    module = pytest.importorskip(library)
    rows = {"id": [1, 2], "audio": ["audio/a.wav", "audio/ü.wav"], "text": ["x", "y"]}
    rows |= {"start": [None, 0.25], "end": [None, 0.5]}
    if library == "pandas":
        module.DataFrame(rows).to_parquet("m.parquet")
    elif library == "polars":
        module.DataFrame(rows).write_parquet("m.parquet")
    else:
        table = pa.table(rows)
        with module.connect() as connection:
            connection.register("manifest", table)
            connection.execute("copy manifest to 'm.parquet' (format parquet)")

    source = open_source("m.parquet", columns=["text"])

    assert ids(source) == ["1", "2"]
    assert source.column_types == {"text": pa.string()}
    first, second = source
    assert first.start is None
    np.testing.assert_array_equal(samples(first), signal(1))
    np.testing.assert_array_equal(samples(second), signal(3)[4000:])


def test_audio_of_another_type_is_refused_with_its_type(tmp_path):
    pq.write_table(pa.table({"audio": [[0.1, 0.2]]}), tmp_path / "m.parquet")
    with pytest.raises(ArgumentError, match=r"'audio' is of type list<"):
        open_source(tmp_path / "m.parquet")


# -- Kaldi ---------------------------------------------------------------------------


def write_ark(folder: Path, names: list[str]) -> str:
    """As Kaldi's wav-copy: keys and WAV files, one behind the other."""
    ark, scp = bytearray(), ""
    for name in names:
        samples, rate = soundfile.read(folder / f"{name}.wav")
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
        ark += f"{name.replace(' ', '_')} ".encode()
        scp += f"{name.replace(' ', '_')} {folder}/wav.ark:{len(ark)}\n"
        ark += file.getvalue()
    (folder / "wav.ark").write_bytes(ark)
    return scp


def test_a_kaldi_folder_gives_its_recordings(corpus):
    (corpus / "wav.scp").write_text(
        "k1 audio/a.wav\nk2  audio/b c.wav \nk3\taudio/ü.wav\n"
    )

    for spec in (".", "wav.scp"):
        source = open_source(spec)
        assert ids(source) == ["k1", "k2", "k3"]
        for seed, utterance in enumerate(source, start=1):
            np.testing.assert_array_equal(samples(utterance), signal(seed))


def test_a_kaldi_archive_gives_each_of_its_recordings_alone(corpus):
    (corpus / "wav.scp").write_text(write_ark(corpus / "audio", ["a", "b c", "ü"]))

    for seed, utterance in enumerate(open_source("."), start=1):
        np.testing.assert_allclose(samples(utterance), signal(seed), atol=2**-15)
        assert inspect(utterance.audio).samples == 8000


def test_kaldi_segments_are_cut_and_may_overshoot_by_half_a_second(corpus):
    (corpus / "wav.scp").write_text("r1 audio/a.wav\nr2 audio/ü.wav\n")
    (corpus / "segments").write_text(
        "u1 r1 0.1 0.3\nu2 r1 0.25 0.99\nu3 r2 0.2 -1\nu4 r2 0.2 1.01\n"
    )

    one, two, three, four = open_source("wav.scp")

    assert (one.id, one.start, one.end, one.samples) == ("u1", 0.1, 0.3, 3200)
    np.testing.assert_array_equal(samples(one), signal(1)[1600:4800])
    np.testing.assert_array_equal(samples(two), signal(1)[4000:])
    np.testing.assert_array_equal(samples(three), signal(3)[3200:])
    with pytest.raises(AudioError, match=r"ü\.wav#0\.2-1\.01: .*of 0\.50 s"):
        samples(four)


@pytest.mark.parametrize(
    ("scp", "segments", "message"),
    [
        ("r touch x.wav |\n", None, r"wav\.scp, line 1: is a command.*wav-copy"),
        ("r a.wav\ns touch x |\n", "u r 0 1\n", r"wav\.scp, line 2: is a command"),
        ("r\n", None, r"wav\.scp, line 1: expected an id and a value"),
        ("r a.wav\n", "u q 0 1\n", r"segments, line 1: there is no recording 'q'"),
        ("r a.wav\n", "u r 0\n", r"segments, line 1: expected utterance, recording"),
        ("r a.wav\n", "u r 0 x\n", r"segments, line 1: end is 'x'; expected seconds"),
        ("r a.wav\n", "u r 0 1 2\n", r"segments, line 1: selects channel 2"),
    ],
)
def test_what_kaldi_files_may_not_hold_is_named(corpus, scp, segments, message):
    (corpus / "wav.scp").write_text(scp)
    if segments is not None:
        (corpus / "segments").write_text(segments)
    with pytest.raises(DumpError, match=message):
        list(open_source("."))
    assert not (corpus / "x.wav").exists()


def test_speakers_and_texts_of_kaldi_are_carried_where_they_are_sorted(corpus):
    (corpus / "wav.scp").write_text("a audio/a.wav\nb audio/a.wav\nd audio/a.wav\n")
    (corpus / "utt2spk").write_text("a s1\nb s2\nc s3\nd s4\n")
    (corpus / "text").write_text("a one  two\nd vier\n")

    source = open_source(".", columns=["speaker", "text"])
    expected = [
        {"speaker": "s1", "text": "one  two"},
        {"speaker": "s2", "text": None},
        {"speaker": "s4", "text": "vier"},
    ]
    assert [u.columns for u in source] == expected
    assert [u.columns for u in source] == expected

    with pytest.raises(ArgumentError, match="no column 'gender'"):
        open_source(".", columns=["gender"])
    (corpus / "utt2spk").write_text("b s2\na s1\nd s4\n")
    with pytest.raises(DumpError, match=r"utt2spk: .*fix_data_dir"):
        list(open_source(".", columns=["speaker"]))
    (corpus / "utt2spk").write_text("a s1\nb s2\nd s4\n")
    (corpus / "wav.scp").write_text("d audio/a.wav\na audio/a.wav\n")
    with pytest.raises(DumpError, match=r"utt2spk: .*'a' comes too late"):
        list(open_source(".", columns=["speaker"]))


# -- Hugging Face --------------------------------------------------------------------


@pytest.fixture
def rows(corpus):
    """A dataset as `datasets` stores it, made without its decoders."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "audio": datasets.Audio(sampling_rate=16000),
            "speaker": datasets.Value("int64"),
            "language": datasets.ClassLabel(names=["de", "en"]),
        }
    )
    data = (corpus / "audio" / "a.wav").read_bytes()
    table = pa.table(
        {
            "id": ["x", "y", "z"],
            "audio": pa.array(
                [
                    {"bytes": data, "path": "a.wav"},
                    {"bytes": None, "path": str(corpus / "audio" / "ü.wav")},
                    None,
                ],
                features.arrow_schema.field("audio").type,
            ),
            "speaker": [7, 8, None],
            "language": [0, 1, 1],
        },
        schema=features.arrow_schema,
    )
    return datasets.Dataset(table)


def check_rows(source) -> None:
    assert ids(source) == ids(source) == ["x", "y", "z"]
    assert source.column_types == {"speaker": pa.int64(), "language": pa.int64()}
    first, second, third = source
    assert first.columns == {"speaker": 7, "language": 0}
    assert third.columns == {"speaker": None, "language": 1}
    np.testing.assert_array_equal(samples(first), signal(1))
    np.testing.assert_array_equal(samples(second), signal(3))
    with pytest.raises(AudioError, match="null"):
        decode(third.audio)


def test_a_folder_of_save_to_disk_is_read_without_a_decoder(corpus, rows):
    rows.save_to_disk("saved")
    for spec in ("saved", "datasets:saved"):
        source = open_source(spec, columns=["speaker", "language"])
        check_rows(source)
        assert not source.streaming


def test_of_a_saved_dict_a_split_has_to_be_chosen(corpus, rows):
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk("saved")

    with pytest.raises(
        ArgumentError, match=r"more than one split; pass .*saved/train.* train, test"
    ):
        open_source("saved")
    with pytest.raises(ArgumentError, match="no split 'dev'"):
        open_source("datasets:saved:dev")
    assert ids(open_source("saved/test")) == ["x", "y", "z"]
    assert ids(open_source("datasets:saved:test")) == ["x", "y", "z"]


def test_a_named_dataset_is_streamed(corpus, rows):
    os.makedirs("hub")
    pq.write_table(
        rows.data.table.replace_schema_metadata(
            rows.with_format("arrow")[:].schema.metadata
        ),
        "hub/validation-00000-of-00001.parquet",
    )

    for spec in ("datasets:hub", "datasets:hub:default:validation", "datasets:hub::"):
        source = open_source(spec, columns=["speaker", "language"])
        assert source.streaming
        check_rows(source)

    with pytest.raises(ArgumentError, match="Bad split: train"):
        open_source("datasets:hub:default:train")
    with pytest.raises(
        ArgumentError, match=r"no column 'text'; its columns are id, au"
    ):
        open_source("datasets:hub", columns=["text"])


def test_of_several_splits_one_has_to_be_named(corpus, rows):
    os.makedirs("hub")
    for split in ("train", "test"):
        pq.write_table(rows.data.table, f"hub/{split}.parquet")
    with pytest.raises(ArgumentError, match=r"such as datasets:hub::train\. There are"):
        open_source("datasets:hub")
    assert ids(open_source("datasets:hub::test")) == ["x", "y", "z"]


def test_rows_of_a_dataset_without_ids_are_numbered(corpus, rows):
    rows.remove_columns("id").save_to_disk("saved")
    assert ids(open_source("saved")) == ["saved:0", "saved:1", "saved:2"]


def test_a_dataset_that_is_a_folder_of_files_is_streamed_without_a_decoder(corpus):
    pytest.importorskip("datasets")
    (corpus / "audio" / "metadata.csv").write_text(
        "file_name,text\na.wav,one\nb c.wav,two\nü.wav,three\n"
    )

    source = open_source("datasets:audio", columns=["text"])

    assert sorted(u.columns["text"] for u in source) == ["one", "three", "two"]
    for utterance in source:
        seed = ["one", "two", "three"].index(utterance.columns["text"]) + 1
        np.testing.assert_array_equal(samples(utterance), signal(seed))


def test_a_dataset_whose_columns_only_the_data_tells_is_streamed(corpus):
    pytest.importorskip("datasets")
    os.makedirs("hub")
    write_table(
        corpus / "hub" / "train.jsonl",
        [{"id": "q", "audio": str(corpus / "audio" / "a.wav"), "n": 3}],
    )
    source = open_source("datasets:hub", columns=["n"])
    (utterance,) = source
    assert source.column_types == {"n": pa.int64()}
    assert (utterance.id, utterance.columns) == ("q", {"n": 3})
    np.testing.assert_array_equal(samples(utterance), signal(1))


def test_a_dataset_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ArgumentError, match=r"pip install 'seamless_w2vbert\[datasets\]"
    ):
        open_source("datasets:x/y")


# -- Lhotse --------------------------------------------------------------------------


@pytest.fixture
def lhotse():
    return pytest.importorskip("lhotse")


def cut_of(lhotse, path: Path, id: str):
    cut = lhotse.Recording.from_file(path, recording_id=id).to_cut()
    cut.supervisions = [
        lhotse.SupervisionSegment(
            f"s-{id}", id, 0, cut.duration, text="hé", speaker="sp", language="de"
        )
    ]
    return cut


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_cuts_of_files_are_what_lhotse_loads(corpus, lhotse, name):
    write(corpus / "long.wav", 5, 40001)
    whole = cut_of(lhotse, corpus / "long.wav", "whole")
    part = whole.truncate(offset=0.5, duration=1.25).with_id("part")
    cuts = lhotse.CutSet.from_cuts([whole, part])
    cuts.to_file(name)

    source = open_source(name, columns=["text", "speaker", "language"])

    assert ids(source) == ["whole", "part"]
    first, second = source
    assert (first.audio, first.start) == (str(corpus / "long.wav"), None)
    assert (second.start, second.end) == (0.5, 1.75)
    assert [u.samples for u in source] == [40001, 20000]
    for utterance, cut in zip(source, cuts, strict=True):
        assert utterance.columns == {"text": "hé", "speaker": "sp", "language": "de"}
        np.testing.assert_array_equal(samples(utterance), cut.load_audio()[0])


def test_cuts_of_channels_and_mixtures_are_loaded_by_lhotse(corpus, lhotse):
    stereo = np.stack([signal(1), signal(2)], axis=1)
    soundfile.write("stereo.wav", stereo, 16000, subtype="FLOAT")
    both = cut_of(lhotse, corpus / "stereo.wav", "both")
    mono = cut_of(lhotse, corpus / "audio" / "a.wav", "mono")
    cuts = [
        both,
        lhotse.MonoCut("right", 0.125, 0.25, 1, recording=both.recording),
        mono.pad(duration=1.0).with_id("padded"),
        mono.append(mono).with_id("twice"),
    ]
    lhotse.CutSet.from_cuts(cuts).to_file("cuts.jsonl")

    utterances = list(open_source("cuts.jsonl", columns=["text"]))

    expected = [
        (signal(1) + signal(2)) / 2,
        signal(2)[2000:6000],
        np.concatenate([signal(1), np.zeros(8000, np.float32)]),
        np.concatenate([signal(1), signal(1)]),
    ]
    assert [u.id for u in utterances] == ["both", "right", "padded", "twice"]
    assert [u.columns["text"] for u in utterances] == ["hé", None, "hé", "hé"]
    for utterance, truth in zip(utterances, expected, strict=True):
        np.testing.assert_allclose(samples(utterance), truth, atol=1e-6)
        assert utterance.samples == inspect(utterance.audio).samples == len(truth)


def test_a_cut_that_lhotse_cannot_load_fails_alone(corpus, lhotse):
    cut = cut_of(lhotse, corpus / "audio" / "a.wav", "a")
    lhotse.CutSet.from_cuts([cut.append(cut)]).to_file("cuts.jsonl")
    (corpus / "audio" / "a.wav").unlink()
    (utterance,) = open_source("cuts.jsonl")
    with pytest.raises(AudioError, match=r"cuts\.jsonl, line 1: cannot be loaded"):
        decode(utterance.audio)


CUT = {
    "id": "a",
    "start": 0,
    "duration": 0.5,
    "channel": 0,
    "type": "MonoCut",
    "recording": {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": "audio/a.wav"}],
        "sampling_rate": 16000,
        "num_samples": 8000,
        "duration": 0.5,
    },
}


def write_cut(**source) -> None:
    cut = json.loads(json.dumps(CUT))
    cut["recording"]["sources"][0] |= source
    mixed = {"id": "m", "type": "MixedCut", "tracks": [{"cut": cut, "offset": 0}]}
    Path("plain.jsonl").write_text(json.dumps(cut))
    Path("mixed.jsonl").write_text(json.dumps(mixed))


@pytest.mark.parametrize(
    "source",
    [
        {"type": "command", "source": "touch x.wav; cat audio/a.wav"},
        {"source": "pipe:touch x.wav; cat audio/a.wav"},
        {"type": "shar", "source": ""},
    ],
)
@pytest.mark.parametrize("name", ["plain.jsonl", "mixed.jsonl"])
def test_commands_in_cuts_are_never_run(corpus, source, name):
    write_cut(**source)
    with pytest.raises(DumpError, match=r"line 1: .*save_audios"):
        list(open_source(name))
    assert not Path("x.wav").exists()


def test_plain_cuts_take_no_lhotse_and_others_say_so(corpus, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lhotse", None)
    monkeypatch.setitem(__import__("sys").modules, "lhotse.serialization", None)
    write_cut()
    (utterance,) = open_source("plain.jsonl")
    np.testing.assert_array_equal(samples(utterance), signal(1))
    with pytest.raises(ArgumentError, match=r"pip install 'seamless_w2vbert\[lhotse\]"):
        open_source("mixed.jsonl")
    with pytest.raises(ArgumentError, match="no column 'age'; of Lhotse cuts text"):
        open_source("plain.jsonl", columns=["age"])


def test_a_cut_without_what_a_cut_has_is_named(corpus):
    Path("c.jsonl").write_text(
        json.dumps(CUT) + '\n{"type": "MonoCut", "id": "b", "recording": {}}\n'
    )
    with pytest.raises(DumpError, match=r"c\.jsonl, line 2: is no Lhotse cut"):
        list(open_source("c.jsonl"))


# -- URLs ----------------------------------------------------------------------------


def test_folders_and_globs_behind_urls_are_read(corpus, memory):
    write(corpus / "audio" / "sub" / "x.flac", 4)
    (corpus / "audio" / ".hidden").write_bytes(b"x")
    upload(memory, corpus / "audio", "/bucket/audio")

    source = open_source("memory://bucket/audio")
    assert ids(source) == ["a.wav", "b c.wav", "sub/x.flac", "ü.wav"]
    np.testing.assert_array_equal(samples(next(iter(source))), signal(1))

    assert ids(open_source("memory://bucket/**/*.flac")) == ["audio/sub/x.flac"]
    assert ids(open_source("memory://bucket/*/*.wav"))[0] == "audio/a.wav"
    assert ids(open_source(f"file://{corpus}/audio")) == ids(open_source("audio"))


@pytest.mark.parametrize("name", [*TABLES, "m.txt", "m.scp", "f.tsv"])
def test_manifests_behind_urls_are_read_with_paths_relative_to_them(
    corpus, memory, name
):
    if name == "m.txt":
        (corpus / "audio" / name).write_text("a.wav\nü.wav\n")
    elif name == "m.scp":
        (corpus / "audio" / name).write_text("a a.wav\nu ü.wav\n")
    elif name == "f.tsv":
        (corpus / "audio" / name).write_text(".\na.wav\t8000\nü.wav\t8000\n")
    else:
        write_table(corpus / "audio" / name, [{"audio": "a.wav"}, {"audio": "ü.wav"}])
    upload(memory, corpus / "audio", "/bucket/audio")

    source = open_source(f"memory://bucket/audio/{name}")

    for utterance, seed in zip(source, (1, 3), strict=True):
        np.testing.assert_array_equal(samples(utterance), signal(seed))


def test_paths_in_a_local_manifest_may_be_urls(corpus, memory):
    upload(memory, corpus / "audio", "/bucket")
    write_table(corpus / "m.csv", [{"audio": "memory://bucket/ü.wav"}])
    (utterance,) = open_source("m.csv")
    assert utterance.id == "memory://bucket/ü.wav"
    np.testing.assert_array_equal(samples(utterance), signal(3))


def test_a_url_that_leads_nowhere_is_an_error(memory):
    with pytest.raises(ArgumentError, match="no such file or folder"):
        open_source("memory://bucket/none")
    with pytest.raises(DumpError, match="nosuch"):
        open_source("nosuch://bucket/none")


# -- what is no source ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no such file or folder; expected a folder, a glob"),
        ("nowhere/*.wav", "there is no folder nowhere"),
        ("*.parquet", "datasets:FOLDER"),
        ("notes.md", "of no known kind; expected a folder"),
        ("a.parquet.gz", "of no known kind"),
        ("", "empty text"),
        ("a\0b", "no such file or folder"),
        ("datasets:", "expected datasets:NAME"),
        ("datasets:a:b:c:d", "expected datasets:NAME"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("a.wav\n")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ArgumentError, match=message):
        open_source(spec)


def test_an_empty_folder_or_glob_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DumpError, match="datasets:FOLDER"):
        open_source(tmp_path)
    with pytest.raises(DumpError, match=r"\*\.wav: there is no audio"):
        open_source(f"{tmp_path}/*.wav")


@pytest.mark.parametrize("spec", ["audio", "audio/*.wav", "l.txt", "t.tsv"])
def test_sources_without_columns_say_so(corpus, spec):
    Path("l.txt").write_text("a.wav\n")
    Path("t.tsv").write_text("/\na.wav\t3\n")
    with pytest.raises(ArgumentError, match="has no columns to carry, such as 'text'"):
        open_source(spec, columns=["text"])


def test_the_columns_are_a_list(corpus):
    with pytest.raises(ArgumentError, match="list of names"):
        open_source("audio", columns="text")


def test_the_sample_recording_comes_through(tmp_path):
    (utterance,) = open_source([SPEECH])
    np.testing.assert_allclose(samples(utterance), read_mono_16k(SPEECH), atol=1e-6)
