"""A dump against ``pipeline(...)`` itself, and against a dump that went on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from folders import files_of

from seamless_w2vbert import (
    ArgumentError,
    DumpError,
    SpeechEncoderPipeline,
    dump,
    merge_dumps,
    open_dump,
    verify_dump,
)
from seamless_w2vbert.dumping.run import plan
from seamless_w2vbert.dumping.store import Store

SMALL = {"shard_seconds": 5.0}
"""Several shards of the corpus."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, pipeline):
    """The corpus dumped without interruption, in several shards."""
    out = tmp_path_factory.mktemp("whole") / "dump"
    report = dump(corpus, out, pipeline, layers=(1, 3), **SMALL)
    assert (report.embedded, report.failed, report.complete) == (24, 0, True)
    return out


def relative_difference(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


# -- what is dumped --------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "safetensors", "npy", "fairseq"])
def test_each_format_holds_what_the_pipeline_gives(corpus, pipeline, tmp_path, format):
    dump(corpus, tmp_path / "d", pipeline, layers=(1, 3), format=format, **SMALL)
    opened = open_dump(tmp_path / "d")

    paths = sorted(corpus.rglob("*.flac"))
    ids = [path.relative_to(corpus).as_posix() for path in paths]
    assert list(opened) == ids

    for path, id in zip(paths[::5], ids[::5], strict=True):
        output = pipeline(path, layers=(1, 3))
        for layer in (1, 3):
            expected = output.hidden_states[layer][0].numpy()
            stored = opened.layer(layer)[id]
            assert stored.dtype == np.float32
            assert relative_difference(stored, expected) < 1e-5


def test_the_index_says_where_everything_came_from(corpus, whole):
    table = pq.read_table(whole / "index")
    rows = {row["id"]: row for row in table.to_pylist()}

    assert len(rows) == 24
    for path in corpus.rglob("*.flac"):
        row = rows[path.relative_to(corpus).as_posix()]
        samples = soundfile.info(path).frames
        assert row["source"] == str(path)
        assert (row["status"], row["error"]) == ("embedded", None)
        assert row["samples"] == samples
        assert row["frames"] == (1 + (samples - 400) // 160) // 2
        assert (whole / "data" / row["shard"]).exists()

    info = json.loads((whole / "dump.json").read_text())
    assert info["complete"] is True
    assert (info["utterances"], info["failed"]) == (24, 0)
    (run,) = info["runs"]
    assert run["torch"] == torch.__version__
    assert "linear" not in run["attention"].lower() or run["attention"]
    assert len(list((whole / "data").iterdir())) > 3


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("mean", lambda h: h.mean(axis=0)),
        ("max", lambda h: h.max(axis=0)),
        ("mean+std", lambda h: np.concatenate([h.mean(axis=0), h.std(axis=0)])),
    ],
)
def test_frames_are_pooled_as_numpy_would(
    corpus, whole, pipeline, tmp_path, pool, expected
):
    dump(corpus, tmp_path / "d", pipeline, layers=3, pool=pool)
    pooled, frames = open_dump(tmp_path / "d"), open_dump(whole, layer=3)

    for id in frames.ids:
        vector = expected(frames[id].astype(np.float64))
        assert pooled[id].shape == vector.shape
        assert relative_difference(pooled[id], vector) < 1e-5


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("parquet", "float16"), ("safetensors", "bfloat16"), ("npy", "float16")],
)
def test_narrow_types_hold_the_rounded_values(
    corpus, pipeline, tmp_path, format, dtype
):
    for kind in (dtype, "float32"):
        dump(corpus, tmp_path / kind, pipeline, format=format, dtype=kind)
    narrow, wide = open_dump(tmp_path / dtype), open_dump(tmp_path / "float32")

    for id in wide.ids:
        rounded = torch.from_numpy(np.array(wide[id])).to(getattr(torch, dtype))
        assert torch.equal(
            torch.from_numpy(np.array(narrow[id])).float(), rounded.float()
        )


def test_statistics_are_those_of_all_frames(corpus, whole):
    opened = open_dump(whole, layer=3)
    frames = np.concatenate([opened[id] for id in opened.ids]).astype(np.float64)
    stored = np.load(whole / "statistics.npz")

    assert stored["frames"] == len(frames)
    np.testing.assert_allclose(stored["mean_3"], frames.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(stored["var_3"], frames.var(axis=0), rtol=1e-9)
    # As MaskGCT and its kin load it.
    loaded = torch.load(whole / "statistics" / "layer-3.pt", weights_only=True)
    np.testing.assert_allclose(loaded["mean"].numpy(), stored["mean_3"], rtol=1e-6)
    np.testing.assert_allclose(loaded["var"].numpy(), stored["var_3"], rtol=1e-6)


@pytest.mark.parametrize("name", ["", "statistics.npz", "statistics/layer-3.pt"])
def test_embeddings_are_normalised_on_request(corpus, whole, pipeline, tmp_path, name):
    dump(corpus, tmp_path / "d", pipeline, layers=3, normalize=whole / name)
    normalized, plain = open_dump(tmp_path / "d"), open_dump(whole, layer=3)

    frames = np.concatenate([normalized[id] for id in normalized.ids])
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(frames.std(axis=0), 1, atol=1e-4)

    mean, variance = plain.statistics(3)
    for id in plain.ids:
        expected = (plain[id] - mean) / np.sqrt(variance)
        assert relative_difference(normalized[id], expected) < 1e-5

    assert not verify_dump(str(tmp_path / "d"), model=None, sample=0).problems


def test_statistics_of_something_else_are_refused(corpus, pipeline, tmp_path):
    np.savez(tmp_path / "s.npz", mean=np.zeros(5), var=np.ones(5))
    torch.save({"mean": torch.zeros(128), "var": torch.zeros(128)}, tmp_path / "z.pt")
    (tmp_path / "text.pt").write_text("no statistics")

    for name, reason in (
        ("s.npz", "has 5 dimensions"),
        ("z.pt", "not positive"),
        ("text.pt", "cannot be read as statistics"),
        ("absent.npz", "cannot be read as statistics"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            dump(corpus, tmp_path / "d", pipeline, normalize=tmp_path / name)


# -- chunks ----------------------------------------------------------------------------


def test_long_recordings_are_whole_unless_chunks_are_asked_for(
    pipeline, speech, tmp_path
):
    (tmp_path / "in").mkdir()
    long = np.tile(speech.samples.numpy(), 4)
    soundfile.write(tmp_path / "in" / "long.wav", long, 16000, subtype="FLOAT")

    dump(tmp_path / "in", tmp_path / "whole", pipeline)
    dump(tmp_path / "in", tmp_path / "chunks", pipeline, chunk=8, overlap=2)
    whole, chunks = open_dump(tmp_path / "whole"), open_dump(tmp_path / "chunks")
    one, other = whole["long.wav"], chunks["long.wav"]

    expected = pipeline(torch.from_numpy(long)).last_hidden_state[0].numpy()
    assert relative_difference(one, expected) < 1e-5
    # As many frames, nearly the same but at the seams, and not the same.
    assert one.shape == other.shape
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1)
    cosine /= np.linalg.norm(other, axis=1)
    assert cosine.mean() > 0.99
    assert relative_difference(other, one) > 1e-4
    assert open_dump(tmp_path / "chunks").settings["chunk"] == 8


# -- going on --------------------------------------------------------------------------


def test_a_dump_that_is_complete_is_left_as_it_is(corpus, whole, pipeline):
    before = files_of(whole)
    report = dump(corpus, whole, pipeline, layers=(1, 3), **SMALL)

    assert (report.utterances, report.new) == (24, 0)
    assert files_of(whole) == before


def test_a_dump_that_was_stopped_goes_on_to_the_same_bits(
    corpus, whole, pipeline, tmp_path
):
    rounds = 0

    while True:
        stop = threading.Event()
        seen = 0

        def count(progress, stop=stop):
            nonlocal seen
            seen += 1
            if seen > 3:
                stop.set()

        report = dump(
            corpus,
            tmp_path / "d",
            pipeline,
            layers=(1, 3),
            progress=count,
            stop=stop,
            **SMALL,
        )
        rounds += 1
        if report.complete:
            break
        with pytest.warns(UserWarning, match="not complete"):
            opened = open_dump(tmp_path / "d", layer=3)
        assert 0 < len(opened) < 24

    assert rounds > 3
    assert files_of(tmp_path / "d") == files_of(whole)


@pytest.mark.parametrize(
    "change",
    [{"layers": (2,)}, {"dtype": "float16"}, {"pool": "mean"}, {"format": "npy"}],
)
def test_other_settings_are_refused(corpus, whole, pipeline, change):
    (name,) = change
    with pytest.raises(DumpError, match=rf"other settings .*{name}"):
        dump(corpus, whole, pipeline, **{"layers": (1, 3), **SMALL, **change})


def test_another_model_is_refused(corpus, whole):
    other = SpeechEncoderPipeline.from_pretrained("tiny-random")
    with torch.no_grad():
        next(other.module.encoder.parameters()).mul_(1.01)
    with pytest.raises(DumpError, match=r"other settings .*model"):
        dump(corpus, whole, other, layers=(1, 3), **SMALL)


def test_a_source_that_has_changed_is_refused_and_one_that_grew_goes_on(
    pipeline, speech, tmp_path
):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b", "c"):
        soundfile.write(folder / f"{name}.wav", speech.samples[:16000], 16000)
    dump(folder, tmp_path / "d", pipeline)

    soundfile.write(folder / "d.wav", speech.samples[:9000], 16000)
    report = dump(folder, tmp_path / "d", pipeline)
    assert (report.utterances, report.new) == (3, 1)

    soundfile.write(folder / "a.wav", speech.samples[:16000], 16000)
    with pytest.raises(
        DumpError, match=r"utterance 0 was 'b\.wav' and is now 'a\.wav'"
    ):
        dump(folder, tmp_path / "d", pipeline)


def test_a_folder_with_something_else_in_it_is_refused(corpus, pipeline, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DumpError, match="not empty and no dump"):
        dump(corpus, tmp_path, pipeline)
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["thesis.tex"]


def test_two_processes_on_one_folder_are_refused(corpus, whole, pipeline):
    import fcntl

    with open(whole / ".seamless_w2vbert-lock", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DumpError, match="another process is writing"):
            dump(corpus, whole, pipeline, layers=(1, 3), **SMALL)


# -- bad input -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_in_five_bad(tmp_path_factory, corpus):
    root = tmp_path_factory.mktemp("bad")
    kinds = [
        b"no audio at all",
        b"",
        (corpus / "speaker0" / "utt-00.flac").read_bytes()[:1000],
    ]
    for number, path in enumerate(sorted(corpus.rglob("*.flac"))[:20]):
        data = path.read_bytes()
        if number % 5 == 4:
            data = kinds[number // 5 % 3]
        (root / f"{number:02}.flac").write_bytes(data)
    return root


def test_bad_files_are_recorded_with_their_reason_and_passed_over(
    one_in_five_bad, pipeline, tmp_path
):
    report = dump(one_in_five_bad, tmp_path / "d", pipeline, **SMALL)
    assert (report.utterances, report.embedded, report.failed) == (20, 16, 4)

    opened = open_dump(tmp_path / "d")
    assert sorted(opened.failures) == ["04.flac", "09.flac", "14.flac", "19.flac"]
    assert "cannot be decoded" in opened.failures["04.flac"]
    assert "empty" in opened.failures["09.flac"]
    assert all(np.isfinite(opened[id]).all() for id in opened.ids)

    found = verify_dump(str(tmp_path / "d"), sample=0)
    assert (found.embedded, found.failed, found.problems) == (16, 4, ())


def test_strict_stops_at_a_bad_file(one_in_five_bad, pipeline, tmp_path):
    with pytest.raises(DumpError, match=r"04\.flac.*--strict"):
        dump(one_in_five_bad, tmp_path / "d", pipeline, strict=True)


def test_failures_are_tried_again_on_request(
    one_in_five_bad, corpus, pipeline, tmp_path
):
    root = tmp_path / "in"
    root.mkdir()
    for path in one_in_five_bad.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    dump(root, tmp_path / "d", pipeline, **SMALL)

    good = (corpus / "speaker0" / "utt-00.flac").read_bytes()
    for number in (4, 9, 14, 19):
        (root / f"{number:02}.flac").write_bytes(good)

    assert dump(root, tmp_path / "d", pipeline, **SMALL).failed == 4
    report = dump(root, tmp_path / "d", pipeline, retry_failed=True, **SMALL)
    assert (report.utterances, report.failed) == (20, 0)
    assert not verify_dump(str(tmp_path / "d"), sample=0).problems


def test_a_dump_of_nothing_but_bad_files_is_complete(tmp_path, pipeline):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(b"no audio")
    report = dump(tmp_path / "in", tmp_path / "d", pipeline)

    assert (report.embedded, report.failed, report.complete) == (0, 1, True)
    assert len(open_dump(tmp_path / "d")) == 0


def test_ids_that_occur_twice_are_refused_before_anything_is_embedded(
    tmp_path, pipeline, speech
):
    pairs = [("a", speech), ("b", speech), ("a", speech)]
    with pytest.raises(DumpError, match="'a' occurs twice, as utterance 0 and 2"):
        dump(pairs, tmp_path / "d", pipeline)


def test_what_float16_cannot_hold_fails_and_is_not_written(corpus, tmp_path):
    loud = SpeechEncoderPipeline.from_pretrained("tiny-random")

    def amplify(output):
        states = {n: 1e6 * hidden for n, hidden in output.hidden_states.items()}
        return replace(output, hidden_states=states)

    loud.insert_after("encoder", amplify)
    report = dump(corpus, tmp_path / "d", loud, dtype="float16")

    assert (report.embedded, report.failed) == (0, 24)
    reasons = set(open_dump(tmp_path / "d").failures.values())
    assert all("float16 cannot hold" in reason for reason in reasons)


def test_a_recording_that_gives_nan_does_not_take_its_batch_with_it(corpus, tmp_path):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    poisoned = soundfile.info(sorted(corpus.rglob("*.flac"))[7]).frames
    width = (1 + (poisoned - 400) // 160) // 2

    def poison(hidden):
        scale = torch.where(hidden.lengths == width, float("nan"), 1.0)
        return replace(hidden, seqs=hidden.seqs * scale[:, None, None])

    pipeline.insert_after("encoder_frontend", poison)
    report = dump(corpus, tmp_path / "d", pipeline)
    assert (report.embedded, report.failed) == (23, 1)
    ((id, reason),) = open_dump(tmp_path / "d").failures.items()
    assert reason.startswith(f"{id}: The encoder's output is not finite")


def test_storage_that_goes_away_is_no_heap_of_failures(corpus, pipeline, tmp_path):
    away = tmp_path / "mount"
    away.mkdir()
    for path in sorted(corpus.rglob("*.flac")):
        (away / path.name).write_bytes(path.read_bytes())
    # Named one by one: nothing says that they have a folder in common.
    paths = sorted(map(str, away.iterdir()))
    seen = 0

    def vanish(progress):
        nonlocal seen
        seen += 1
        if seen == 6:
            away.rename(tmp_path / "elsewhere")

    options = {"max_frames": 300, "shard_seconds": 3.0}
    with pytest.raises(DumpError, match="went away"):
        dump(paths, tmp_path / "d", pipeline, progress=vanish, **options)

    (tmp_path / "elsewhere").rename(away)
    report = dump(paths, tmp_path / "d", pipeline, **options)
    assert (report.utterances, report.failed) == (24, 0)
    assert 0 < report.new < 24


def test_a_retry_never_gives_up_what_was_embedded(one_in_five_bad, pipeline, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for path in one_in_five_bad.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    paths = sorted(map(str, root.iterdir()))
    dump(paths, tmp_path / "d", pipeline, **SMALL)
    before = files_of(tmp_path / "d")

    # Now others cannot be read, and those that could not still cannot.
    for path in paths[::2]:
        with open(path, "wb") as file:
            file.write(b"no audio")
    report = dump(paths, tmp_path / "d", pipeline, retry_failed=True, **SMALL)

    assert (report.embedded, report.failed) == (16, 4)
    after = files_of(tmp_path / "d")
    assert {n: c for n, c in after.items() if n.startswith("data")} == {
        n: c for n, c in before.items() if n.startswith("data")
    }
    assert verify_dump(str(tmp_path / "d"), sample=0).problems == ()


def test_a_retry_behind_a_url_leaves_true_statistics(tmp_path, pipeline, speech):
    soundfile.write(tmp_path / "a.wav", speech.samples[:16000], 16000)
    (tmp_path / "b.wav").write_bytes(b"no audio")
    paths = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    out = "memory://bucket/retried"
    dump(paths, out, pipeline)
    soundfile.write(tmp_path / "b.wav", 0.1 * speech.samples[16000:48000], 16000)
    report = dump(paths, out, pipeline, retry_failed=True)
    assert (report.embedded, report.failed) == (2, 0)

    opened = open_dump(out)
    frames = np.concatenate([opened[id] for id in opened.ids]).astype(np.float64)
    mean, variance = opened.statistics(3)
    np.testing.assert_allclose(mean, frames.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variance, frames.var(axis=0), rtol=1e-9)
    assert verify_dump(out, sample=0).problems == ()


def test_a_shard_whose_file_is_gone_is_embedded_again(
    corpus, whole, pipeline, tmp_path
):
    out = tmp_path / "d"
    dump(corpus, out, pipeline, layers=(1, 3), **SMALL)
    sorted((out / "data").iterdir())[2].unlink()
    report = dump(corpus, out, pipeline, layers=(1, 3), **SMALL)
    assert 0 < report.new < 24
    assert files_of(out) == files_of(whole)


def test_a_run_that_is_refused_leaves_a_complete_dump_complete(
    pipeline, speech, tmp_path
):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        soundfile.write(folder / f"{name}.wav", speech.samples[:16000], 16000)
    dump(folder, tmp_path / "d", pipeline)
    (folder / "a.wav").unlink()

    with pytest.raises(DumpError, match="has changed"):
        dump(folder, tmp_path / "d", pipeline)
    with pytest.raises(ArgumentError, match="max_frames"):
        dump(folder, tmp_path / "d", pipeline, max_frames=0)
    assert open_dump(tmp_path / "d").complete


def test_a_pipeline_with_another_step_is_refused(corpus, whole):
    other = SpeechEncoderPipeline.from_pretrained("tiny-random")
    other.insert_after("fbank", lambda fbank: fbank[4:])
    with pytest.raises(DumpError, match=r"other settings .*stages"):
        dump(corpus, whole, other, layers=(1, 3), **SMALL)


def test_storage_that_is_away_from_the_start_is_no_dump_of_failures(tmp_path, pipeline):
    paths = [str(tmp_path / "away" / f"{name}.wav") for name in "abc"]
    with pytest.raises(DumpError, match="went away"):
        dump(paths, tmp_path / "d", pipeline)


def test_storage_that_goes_away_in_the_first_shard_is_noticed(
    corpus, pipeline, tmp_path
):
    away = tmp_path / "mount"
    away.mkdir()
    for path in corpus.rglob("*.flac"):
        (away / path.name).write_bytes(path.read_bytes())

    def vanish(progress):
        if progress.done == 6:
            away.rename(tmp_path / "elsewhere")

    with pytest.raises(DumpError, match="went away"):
        dump(
            sorted(map(str, away.iterdir())),
            tmp_path / "d",
            pipeline,
            progress=vanish,
            max_frames=300,
        )


def test_what_a_format_cannot_hold_fails_before_it_counts(
    corpus, pipeline, tmp_path, monkeypatch
):
    from seamless_w2vbert.dumping.formats import parquet

    monkeypatch.setattr(parquet, "_MAX_PAGE", 40_000)
    report = dump(corpus, tmp_path / "d", pipeline)
    assert report.failed > 0
    opened = open_dump(tmp_path / "d")
    frames = sum(len(opened[id]) for id in opened.ids)
    assert np.load(tmp_path / "d" / "statistics.npz")["frames"] == frames
    with pytest.raises(DumpError, match="--strict"):
        dump(corpus, tmp_path / "strict", pipeline, strict=True)


def test_a_name_that_is_no_folder_for_a_dump_is_refused(corpus, pipeline, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(DumpError, match="is a file"):
        dump(corpus, tmp_path / "file", pipeline)
    with pytest.raises(ArgumentError, match="is empty"):
        dump(corpus, "", pipeline)
    with pytest.raises(ArgumentError, match="UTF-8"):
        dump(corpus, tmp_path / "d\udcff", pipeline)


# -- job arrays ------------------------------------------------------------------------


def test_the_jobs_of_an_array_make_up_the_whole(corpus, whole, pipeline, tmp_path):
    out = tmp_path / "jobs"
    options = {"layers": (1, 3), "num_shards": 3, **SMALL}
    reports = [
        dump(corpus, out, pipeline, shard_index=index, **options) for index in (2, 0, 1)
    ]
    expected = open_dump(whole, layer=3)
    seconds = [report.hours * 3600 for report in reports]

    assert sum(report.utterances for report in reports) == 24
    assert max(seconds) - min(seconds) <= 2 * 2.5  # of the longest utterance

    together = open_dump(out, layer=3)
    assert sorted(together.ids) == sorted(expected.ids)
    assert together.complete
    for id in expected.ids:
        assert relative_difference(together[id], expected[id]) < 1e-5

    merge_dumps([out], tmp_path / "merged")
    merged = open_dump(tmp_path / "merged", layer=3)
    assert merged.ids == together.ids
    for id in merged.ids:
        assert np.array_equal(merged[id], together[id])
    found = verify_dump(str(tmp_path / "merged"), sample=0)
    assert (found.embedded, found.problems) == (24, ())
    np.testing.assert_allclose(
        merged.statistics(3)[1], expected.statistics(3)[1], rtol=1e-4
    )

    with pytest.raises(DumpError, match="of 3 jobs, not 4"):
        dump(corpus, out, pipeline, shard_index=0, **{**options, "num_shards": 4})


def test_an_array_with_a_job_missing_is_not_merged(corpus, pipeline, tmp_path):
    for index in (0, 2):
        dump(corpus, tmp_path / "d", pipeline, shard_index=index, num_shards=3)
    with pytest.raises(DumpError, match="missing, the first is number 1"):
        merge_dumps([tmp_path / "d"], tmp_path / "merged")
    with pytest.warns(UserWarning, match="complete"):
        assert not open_dump(tmp_path / "d").complete


def test_jobs_of_different_sources_are_refused(corpus, pipeline, speech, tmp_path):
    dump(corpus, tmp_path / "d", pipeline, shard_index=0, num_shards=2)
    with pytest.raises(DumpError, match="has other ids"):
        dump([("a", speech)], tmp_path / "d", pipeline, shard_index=1, num_shards=2)


def test_what_is_lost_of_a_dump_is_not_merged_away(corpus, pipeline, tmp_path):
    dump(corpus, tmp_path / "d", pipeline, **SMALL)
    sorted((tmp_path / "d" / "index").iterdir())[1].unlink()
    with pytest.raises(DumpError, match="the index lacks utterance"):
        merge_dumps([tmp_path / "d"], tmp_path / "merged")


def test_a_merge_can_be_repeated(corpus, pipeline, tmp_path):
    dump(corpus, tmp_path / "d", pipeline, **SMALL)
    for _ in range(2):
        report = merge_dumps([tmp_path / "d"], tmp_path / "merged")
        assert report.embedded == 24


def test_more_jobs_than_utterances_leave_some_empty(pipeline, speech, tmp_path):
    pairs = [("a", speech), ("b", speech)]
    for index in range(4):
        dump(pairs, tmp_path / "d", pipeline, shard_index=index, num_shards=4)
    merge_dumps([tmp_path / "d"], tmp_path / "merged")
    assert sorted(open_dump(tmp_path / "merged").ids) == ["a", "b"]


def test_dumps_with_an_utterance_in_common_are_not_merged(pipeline, speech, tmp_path):
    for name in "xy":
        dump([("a", speech)], tmp_path / name, pipeline)
    with pytest.raises(DumpError, match="'a' occurs twice"):
        merge_dumps([tmp_path / "x", tmp_path / "y"], tmp_path / "merged")


# -- other -----------------------------------------------------------------------------


def test_a_plan_counts_without_writing(corpus, whole, pipeline):
    planned = plan(corpus, pipeline, layers=(1, 3))
    opened = open_dump(whole, layer=3)
    stored = sum(2 * opened[id].nbytes for id in opened.ids)

    assert planned.utterances == 24
    # Headers give the length to within a frame.
    assert planned.bytes == pytest.approx(stored, rel=0.01)
    assert planned.hours * 3600 == pytest.approx(
        sum(soundfile.info(path).duration for path in corpus.rglob("*.flac")), rel=0.02
    )
    assert planned.seconds > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "hdf5"}, "'hdf5'"),
        ({"dtype": "int8"}, "'int8'"),
        ({"dtype": "bfloat16"}, "parquet has no bfloat16"),
        ({"pool": "median"}, "'median'"),
        ({"layers": 9}, "Layer 9"),
        ({"overlap": 1.0}, "`overlap` is of chunks"),
        ({"chunk": 2.0, "overlap": 3.0}, "make no sense"),
        ({"shard_index": 2, "num_shards": 2}, "does not exist"),
        ({"shard_size": 0}, "`shard_size` is 0"),
        ({"workers": 2}, "`workers`"),
        ({"engine": "slurm"}, "'slurm'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    corpus, pipeline, tmp_path, options, reason
):
    with pytest.raises(ArgumentError, match=reason):
        dump(corpus, tmp_path / "d", pipeline, **options)
    assert not (tmp_path / "d").exists()


def test_damage_to_a_dump_is_found(corpus, pipeline, tmp_path):
    out = tmp_path / "d"
    dump(corpus, out, pipeline, format="safetensors", **SMALL)
    assert verify_dump(str(out), sample=0).problems == ()

    shard = sorted((out / "data").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    (problem,) = verify_dump(str(out), sample=0).problems
    assert shard.name in problem
    assert "not what was written" in problem

    (out / "statistics.npz").rename(tmp_path / "kept.npz")
    assert "statistics.npz: cannot be read" in " ".join(
        verify_dump(str(out), sample=0).problems
    )
    (tmp_path / "kept.npz").rename(out / "statistics.npz")
    shard.unlink()
    assert shard.name in verify_dump(str(out), sample=0).problems[0]
    sorted((out / "index").iterdir())[1].unlink()
    problems = " ".join(verify_dump(str(out), sample=0).problems)
    assert "are missing" in problems
    assert "counts 24 utterances" in problems


def test_a_url_is_as_good_as_a_folder(corpus, whole, pipeline, tmp_path):
    """fsspec's own store in memory stands behind the URL."""
    out = "memory://bucket/dump"
    dump(corpus, out, pipeline, layers=(1, 3), **SMALL)
    remote, expected = open_dump(out, layer=3), open_dump(whole, layer=3)

    assert remote.ids == expected.ids
    for id in expected.ids:
        assert np.array_equal(remote[id], expected[id])
    assert verify_dump(out, sample=0).problems == ()
    assert dump(corpus, out, pipeline, layers=(1, 3), **SMALL).new == 0


def test_the_url_of_a_folder_is_that_folder(corpus, whole, pipeline, tmp_path):
    out = tmp_path / "ü b"
    dump(corpus, f"file://{out}", pipeline, layers=(1, 3), **SMALL)

    assert files_of(out) == files_of(whole)
    assert not (tmp_path / "file:").exists()
    with Store(out).lock(), pytest.raises(DumpError, match="another process"):
        dump(corpus, f"file://{out}", pipeline, layers=(1, 3), **SMALL)
    assert open_dump(f"file://{out}", layer=3).ids == open_dump(out, layer=3).ids
    assert verify_dump(f"file://{out}", sample=0).problems == ()


@pytest.mark.parametrize("format", ["npy", "fairseq"])
def test_formats_of_several_files_lie_behind_a_url_too(
    corpus, pipeline, tmp_path, format
):
    out = f"memory://bucket/{format}"
    dump(corpus, out, pipeline, format=format, **SMALL)
    dump(corpus, tmp_path / "d", pipeline, format=format, **SMALL)
    remote, local = open_dump(out), open_dump(tmp_path / "d")

    assert remote.ids == local.ids
    assert all(np.array_equal(remote[id], local[id]) for id in local.ids)
    assert verify_dump(out, sample=0).problems == ()
    merge_dumps([out], tmp_path / "merged")
    assert open_dump(tmp_path / "merged").ids == local.ids
