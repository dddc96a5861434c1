"""Each kind of source, dumped and read back, against the pipeline on the samples."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from seamless_w2vbert import dump, open_dump, verify_dump

RATE = 16000


@pytest.fixture(scope="module")
def utterances(speech):
    """Three stretches of speech as 16-bit files hold them, by name."""
    samples = speech.samples.numpy()
    stretches = {"a": (0, 16000), "b": (20000, 31000), "c": (40000, 62500)}
    return {
        name: np.round(samples[start:stop] * 2**15).astype(np.int16)
        for name, (start, stop) in stretches.items()
    }


def wav_bytes(samples) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV")
    return file.getvalue()


def make_folder(root, utterances):
    (root / "in").mkdir()
    for name, samples in utterances.items():
        soundfile.write(root / "in" / f"{name}.flac", samples, RATE)
    return root / "in", {f"{name}.flac": name for name in utterances}


def make_glob(root, utterances):
    folder, ids = make_folder(root, utterances)
    return f"{folder}/*.flac", ids


def make_list(root, utterances):
    folder, _ = make_folder(root, utterances)
    paths = {f"{folder}/{name}.flac": name for name in utterances}
    (root / "paths.txt").write_text("".join(f"{path}\n" for path in paths))
    return root / "paths.txt", paths


def make_fairseq(root, utterances):
    folder, ids = make_folder(root, utterances)
    lines = [f"{id}\t{len(utterances[name])}" for id, name in ids.items()]
    (root / "train.tsv").write_text("\n".join([str(folder), *lines, ""]))
    return root / "train.tsv", ids


def make_stopes(root, utterances):
    """An uncompressed archive, clips of which are named by their bytes."""
    rows = ["id\taudio\ttext"]
    with tarfile.open(root / "clips.tar", "w") as archive:
        for name, samples in utterances.items():
            data = wav_bytes(samples)
            info = tarfile.TarInfo(f"{name}.wav")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with tarfile.open(root / "clips.tar") as archive:
        for member in archive:
            place = f"clips.tar:{member.offset_data}:{member.size}"
            rows.append(f"{member.name[0]}\t{place}\ttext of {member.name[0]}")
    (root / "manifest.tsv").write_text("\n".join([*rows, ""]))
    return root / "manifest.tsv", {name: name for name in utterances}


def make_kaldi(root, utterances):
    """One recording, and where the utterances are in it."""
    pause = np.zeros(RATE, np.int16)
    parts, segments, position = [pause], [], len(pause)
    for name, samples in utterances.items():
        start, end = position / RATE, (position + len(samples)) / RATE
        segments.append(f"{name} talk {start} {end}\n")
        parts += [samples, pause]
        position += len(samples) + len(pause)
    soundfile.write(root / "talk.wav", np.concatenate(parts), RATE)
    (root / "wav.scp").write_text(f"talk {root / 'talk.wav'}\n")
    (root / "segments").write_text("".join(segments))
    return root, {name: name for name in utterances}


def make_jsonl(root, utterances):
    make_folder(root, utterances)
    rows = [
        {"id": name, "audio": f"in/{name}.flac", "text": f"text of {name}"}
        for name in utterances
    ]
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "m.jsonl", {name: name for name in utterances}


def make_csv(root, utterances):
    make_folder(root, utterances)
    with open(root / "m.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "audio", "text"])
        writer.writerows([n, f"in/{n}.flac", f'text, "of" {n}'] for n in utterances)
    return root / "m.csv", {name: name for name in utterances}


def make_parquet(root, utterances):
    audio = [{"bytes": wav_bytes(s), "path": None} for s in utterances.values()]
    columns = {"id": list(utterances), "audio": audio, "text": ["x", "y", "z"]}
    pq.write_table(pa.table(columns), root / "m.parquet")
    return root / "m.parquet", {name: name for name in utterances}


def make_saved_dataset(root, utterances):
    datasets = pytest.importorskip("datasets")
    audio = [{"bytes": wav_bytes(s), "path": None} for s in utterances.values()]
    data = datasets.Dataset.from_dict({"id": list(utterances), "audio": audio})
    data.save_to_disk(str(root / "saved"))
    return root / "saved", {name: name for name in utterances}


def make_named_dataset(root, utterances):
    pytest.importorskip("datasets")
    (root / "data").mkdir()
    path, ids = make_parquet(root, utterances)
    path.rename(root / "data" / "train-00000-of-00001.parquet")
    return f"datasets:{root / 'data'}::train", ids


def make_cuts(root, utterances):
    lhotse = pytest.importorskip("lhotse")
    folder, _ = make_folder(root, utterances)
    cuts = [
        lhotse.Recording.from_file(folder / f"{name}.flac").to_cut().with_id(name)
        for name in utterances
    ]
    lhotse.CutSet.from_cuts(cuts).to_file(str(root / "cuts.jsonl.gz"))
    return root / "cuts.jsonl.gz", {name: name for name in utterances}


def make_url(root, utterances):
    filesystem = fsspec.filesystem("memory")
    for name, samples in utterances.items():
        filesystem.pipe(f"/{root.name}/{name}.wav", wav_bytes(samples))
    return f"memory://{root.name}", {f"{name}.wav": name for name in utterances}


def make_pairs(root, utterances):
    return list(utterances.items()), {name: name for name in utterances}


MAKERS = [value for name, value in list(globals().items()) if name.startswith("make_")]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__[5:])
def test_a_source_is_dumped_as_the_pipeline_embeds_it(
    utterances, pipeline, tmp_path, make
):
    source, ids = make(tmp_path, utterances)
    report = dump(source, tmp_path / "d", pipeline)
    assert (report.embedded, report.failed) == (3, 0)

    opened = open_dump(tmp_path / "d")
    assert sorted(opened.ids) == sorted(ids)
    for id, name in ids.items():
        expected = pipeline(utterances[name]).last_hidden_state[0].numpy()
        assert opened[id].shape == expected.shape
        assert np.abs(opened[id] - expected).max() < 1e-5 * np.abs(expected).max()

    # And it goes on from what is there.
    again = dump(source, tmp_path / "d", pipeline)
    assert (again.utterances, again.new) == (3, 0)


@pytest.mark.parametrize(
    "make", [make_stopes, make_jsonl, make_csv, make_parquet, make_kaldi]
)
def test_columns_are_carried_beside_the_embeddings(
    utterances, pipeline, tmp_path, make
):
    source, _ = make(tmp_path, utterances)
    if make is make_kaldi:
        lines = [f"{name} text of {name}\n" for name in utterances]
        (tmp_path / "text").write_text("".join(lines))
    dump(source, tmp_path / "d", pipeline, columns=("text",))

    index = pq.read_table(tmp_path / "d" / "index").to_pylist()
    shard = pq.read_table(tmp_path / "d" / "data").to_pylist()
    texts = {row["id"]: row["text"] for row in index}
    assert texts == {row["id"]: row["text"] for row in shard}
    assert len(set(texts.values())) == 3
    if make is make_csv:
        assert texts["b"] == 'text, "of" b'


def test_a_sample_of_what_lies_in_a_table_is_embedded_again(utterances, tmp_path):
    source, _ = make_parquet(tmp_path, utterances)
    dump(source, tmp_path / "d", "tiny-random")
    found = verify_dump(str(tmp_path / "d"), sample=3)
    assert (found.sampled, found.problems) == (3, ())
    assert found.largest_difference < 1e-5


def test_a_recording_that_has_changed_is_noticed(utterances, tmp_path):
    folder, _ = make_folder(tmp_path, utterances)
    dump(folder, tmp_path / "d", "tiny-random")
    soundfile.write(folder / "b.flac", utterances["b"][::-1], RATE)
    (problem,) = verify_dump(str(tmp_path / "d"), sample=3).problems
    assert "'b.flac'" in problem
    assert "has the file changed?" in problem
