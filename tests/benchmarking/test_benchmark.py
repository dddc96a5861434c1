from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import numpy as np
import pytest
import soundfile
import torch
from command import run
from folders import small_disk
from reference import transformers_twin

from seamless_w2vbert import ArgumentError, CheckpointError
from seamless_w2vbert.architecture import Architecture
from seamless_w2vbert.benchmarking import (
    RANDOM_600M,
    Case,
    benchmark,
    corpus,
    memory,
    peer_ctranslate2,
)
from seamless_w2vbert.benchmarking.limit import Limit, Sizes
from seamless_w2vbert.benchmarking.models import load_stock, sizes_of
from seamless_w2vbert.benchmarking.peer_ctranslate2 import CTranslate2Runner
from seamless_w2vbert.benchmarking.sides import (
    MissingSideError,
    Settings,
    check_installed,
)
from seamless_w2vbert.benchmarking.worker import SideError, Worker

SIDES = ("package", "early-stop", "transformers", "seamless", "ctranslate2", "limit")


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """What the real command writes and prints."""
    folder = tmp_path_factory.mktemp("bench")
    result = run(
        "bench",
        *("--model", "tiny-random", "--inputs", "0.5,2x1", "--dtype", "float32"),
        *("--repeats", "1", "--corpus-seconds", "3", "--threads", "1"),
        *("--json", folder / "b.json", "--report", folder / "b.html"),
        COLUMNS="",  # as when it is written to a file
    )
    assert result.returncode == 0, result.stderr
    return result, json.loads((folder / "b.json").read_text()), folder


def test_every_side_runs_every_input_or_says_why_not(benched):
    _, read, _ = benched
    found = {(one["side"], one["input"]): one for one in read["measurements"]}

    assert set(found) == {(side, case) for side in SIDES for case in ("1x0.5", "2x1")}
    for one in found.values():
        assert (one["median"] is None) == (one["state"] != "ok")
        assert one["reason"] or one["state"] == "ok"
        assert len(one["seconds"]) == (1 if one["state"] == "ok" else 0)
    # Where it is installed, its width is fixed, and tiny-random is narrower.
    assert found["ctranslate2", "2x1"]["state"] == "missing"
    for side in ("package", "early-stop", "transformers", "limit"):
        assert found[side, "2x1"]["state"] == "ok"


def test_ratios_are_quotients_of_the_medians(benched):
    _, read, _ = benched
    by_side = {(one["side"], one["input"]): one for one in read["measurements"]}

    for one in read["measurements"]:
        if one["state"] != "ok":
            assert one["ratio_to_package"] is None
            continue
        assert one["median"] == median(one["seconds"])
        package = by_side["package", one["input"]]["median"]
        limit = by_side["limit", one["input"]]["median"]
        audio = one["batch"] * one["seconds_each"]
        assert one["ratio_to_package"] == pytest.approx(one["median"] / package)
        assert one["fraction_of_limit"] == pytest.approx(limit / one["median"])
        assert one["times_real_time"] == pytest.approx(audio / one["median"])
        early = one["side"] == "early-stop"
        assert one["fraction_of_whole"] == (one["ratio_to_package"] if early else None)


def test_outputs_are_compared_and_memory_is_measured(benched):
    _, read, _ = benched

    for one in read["measurements"]:
        if one["side"] in ("package", "transformers"):
            assert one["cosine"] > 0.99999
            assert one["cosine_worst"] > 0.9999
            assert one["peak_bytes"] >= 0
            assert one["weights_bytes"] > 0


def test_the_limit_is_the_models_multiply_adds_at_the_rate_of_a_product(benched):
    _, read, _ = benched

    for one in read["measurements"]:
        if one["side"] == "limit":
            detail = one["detail"]
            seconds = 2e-9 * detail["multiply_adds"] / detail["gflop_per_second"]
            assert one["seconds"][-1] == pytest.approx(seconds, rel=1e-6)


def test_machine_versions_and_threads_are_said(benched):
    result, read, _ = benched

    assert read["machine"]["threads"] == 1
    assert read["machine"]["cores"] >= 1
    assert read["versions"]["torch"] == version("torch")
    assert read["versions"]["torch"] in result.stdout
    assert read["machine"]["processor"] in result.stdout
    assert (read["num_layers"], read["early_layer"]) == (3, 2)


def test_the_table_names_what_is_missing_and_why(benched):
    result, _, _ = benched

    assert "Transformers" in result.stdout
    assert "missing" in result.stdout
    reason = "model_dim 1024 fixed" if find_spec("ctranslate2") else "[bench]"
    assert reason in result.stdout
    for column in ("of limit", "peak MB", "cosine"):
        assert column in result.stdout


def test_the_corpus_has_rates_and_a_share_of_padding(benched):
    _, read, _ = benched
    (rates,) = read["corpus"]
    by_name = {rate["name"]: rate for rate in rates["rates"]}

    assert rates["audio_seconds"] >= 3
    assert 0 <= rates["padded_share"] < 1
    assert 0 < rates["padded_share_of_hour"] < 1
    for rate in rates["rates"]:
        per_hour = rates["audio_seconds"] / median(rate["seconds"])
        assert rate["hours_per_hour"] == pytest.approx(per_hour)
        part = per_hour / by_name["encoder"]["hours_per_hour"]
        assert rate["fraction_of_encoder"] == pytest.approx(part)
    assert {"decode FLAC", "decode WAV", "fbank", "encoder", "stream"} <= set(by_name)


def test_the_page_holds_the_picture_and_the_figures(benched):
    _, read, folder = benched
    page = (folder / "b.html").read_text()

    assert "data:image/png;base64,iVBORw0KGgo" in page
    assert f"{read['measurements'][0]['median']:.3f}" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "4by10"], "'4by10'"),
        (["--report", "page.pdf"], "use .html or .png"),
        (["--json", "no/such/b.json"], "--json no/such/b.json"),
    ],
)
def test_wrong_options_are_said_in_a_line(arguments, message):
    result = run("bench", "--model", "tiny-random", *arguments)

    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"cases": []},
        {"dtypes": []},
        {"dtypes": ["int4"]},
        {"sides": ["package", "fairseq"]},
        {"dtypes": ["float32", "float32"]},
        {"sides": ["package", "package"]},
        {"repeats": 0},
        {"num_layers": 0},
        {"threads": 0},
        {"max_seconds": 0},
        {"corpus_seconds": -1},
        {"corpus_seconds": float("nan")},
        {"device": "gpu"},
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments):
    with pytest.raises(ArgumentError):
        benchmark("tiny-random", **arguments)


@pytest.mark.parametrize("text", ["", "x5", "0x5", "5x0", "1x0.01", "-1x5", "1x5x2"])
def test_an_input_is_a_count_and_seconds(text):
    assert Case.parse("4x2.5") == Case(4, 2.5)
    assert Case.parse(" 20 ") == Case.parse("1x20s") == Case(1, 20.0)
    with pytest.raises(ArgumentError):
        Case.parse(text)


def test_a_model_that_cannot_be_loaded_is_the_error_that_loading_gives():
    with pytest.raises(CheckpointError, match="no_such_model"):
        benchmark("no_such_model", cases=[Case(1, 1)], corpus_seconds=0)


def test_what_does_not_fit_into_the_time_is_said():
    result = benchmark(
        "tiny-random",
        cases=[Case(1, 1)],
        dtypes=["float32"],
        sides=["package"],
        max_seconds=1e-6,
        corpus_seconds=0,
    )
    (one,) = result.measurements

    # Stopped, or timed once although no time was left for more: by the machine's load.
    assert one.state == "too slow" or (one.is_cold and len(one.seconds) == 1)
    assert one.reason
    assert one.reason in result.skipped[0]


def test_a_corpus_that_cannot_be_run_takes_nothing_else_with_it(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    if not small_disk(disk):
        pytest.skip("file systems can only be mounted by root")

    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    try:
        result = benchmark(
            "tiny-random",
            cases=[Case(1, 1)],
            dtypes=["float32"],
            sides=["package"],
            repeats=1,
            corpus_seconds=60,  # 1.9 MB, on a disk of 1.5
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

    (one,) = result.measurements
    assert one.median is not None
    assert not result.corpus
    assert result.skipped == list(result.left_out)
    assert "corpus, float32: failed" in result.skipped[0]


def test_ctranslate2_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(MissingSideError, match="bench"):
        check_installed("ctranslate2")


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("int8", 0.99)])
def test_ctranslate2_gives_every_second_frame_behind_its_adapter(
    ctranslate2_folder, dtype, least
):
    folder, fbanks, expected = ctranslate2_folder
    settings = Settings("ctranslate2", dtype, "", None, "cpu", 1, folder)
    side = CTranslate2Runner(settings)
    output = side.output(side.run(side.prepare(fbanks), None))
    expected = expected[:, side.frames]

    frames = expected.shape[1]
    assert frames == 24
    cosines = (output[:, :frames] * expected).sum(-1) / (
        np.linalg.norm(output[:, :frames], axis=-1) * np.linalg.norm(expected, axis=-1)
    )
    assert cosines.min() > least


@pytest.fixture(scope="module")
def ctranslate2_folder(tmp_path_factory):
    """One block of the true width in CTranslate2's format, and what Transformers makes
    of an input with the same weights."""
    pytest.importorskip("ctranslate2")
    folder = str(tmp_path_factory.mktemp("ctranslate2"))
    module = load_stock(RANDOM_600M, 1, torch.float32, "cpu")
    twin = transformers_twin(module, Architecture(num_layers=1))
    fbanks = np.random.default_rng(3).standard_normal((2, 98, 80)).astype(np.float32)
    with torch.inference_mode():
        stacked = torch.from_numpy(fbanks).reshape(2, 49, 160)
        expected = twin(stacked).last_hidden_state.numpy()

    peer_ctranslate2.convert(twin, folder)

    return folder, fbanks, expected


# -- the parts -----------------------------------------------------------------------


def test_multiply_adds_are_those_that_torch_counts(tiny, tiny_twin):
    from torch.utils.flop_counter import FlopCounterMode

    frames, batch = 50, 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_twin(torch.zeros(batch, frames, 160))
    sizes = sizes_of(load_stock("tiny-random", None, torch.float32, "cpu"))

    # Transformers multiplies each query with a relative key per position, S of them;
    # there are only so many different ones.
    spared = frames - sizes.relative_positions
    extra = batch * frames * sizes.num_layers * sizes.model_dim * spared
    expected = counter.get_total_flops() // 2 - extra
    assert sizes.multiply_adds(batch, frames) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_is_found_in_each_dtype(dtype):
    limit = Limit(Sizes(1, 64, 128, 31, 73, 160, 4), dtype, "cpu")
    first, second = (limit.measure(1, 20) for _ in range(2))

    assert first["multiply_adds"] == second["multiply_adds"]
    assert first["seconds"] > 0
    assert second["way"]


def test_a_model_is_cut_to_its_first_layers():
    whole = load_stock("tiny-random", None, torch.float32, "cpu").state_dict()
    cut = load_stock("tiny-random", 2, torch.float32, "cpu").state_dict()

    assert {name for name in whole if ".layers.2." not in name} == set(cut)
    assert all(torch.equal(cut[name], whole[name]) for name in cut)
    with pytest.raises(ArgumentError, match="has 3 layers"):
        load_stock("tiny-random", 4, torch.float32, "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_is_that_since_the_mark():
    meter = memory.HostMeter()
    size = 200 * 2**20
    np.ones(size, np.uint8)

    meter.reset()
    base = meter.now()
    np.ones(size // 2, np.uint8)
    peak = meter.peak() - base

    # The system counts pages in batches.
    assert 0.95 * size / 2 < peak < 0.75 * size


def test_a_process_that_takes_too_long_is_stopped():
    worker = Worker(threads=1)
    with pytest.raises(SideError, match=r"stopped after 0\.01 s") as caught:
        worker.ask("convert", 0.01, settings={})

    assert caught.value.state == "too slow"
    with pytest.raises(SideError):
        worker.ask("limit", 1.0, batch=1, frames=1)


def test_lengths_of_the_corpus_are_log_normal_between_1_and_30_seconds():
    lengths = np.array(corpus.draw_lengths(20_000))

    assert lengths.min() >= 1
    assert lengths.max() <= 30
    assert lengths.sum() >= 20_000
    assert 5 < np.median(lengths) < 9
    assert lengths.tolist() == corpus.draw_lengths(20_000)


def test_one_more_step_over_the_corpus_is_timed_beside_the_others(
    tiny, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setitem(corpus.STEPS, "dump", lambda work: seen.append(work))
    rates = corpus.measure(tiny, tmp_path, 4.0, repeats=2, max_seconds=100.0)

    (work, _) = seen
    assert rates.fraction_of_encoder("dump") > 0
    assert rates.files == len(work.flac) == len(work.wav)
    durations = [soundfile.info(path).duration for path in work.flac]
    assert sum(durations) == pytest.approx(rates.audio_seconds, abs=1e-3 * rates.files)
    valid = sum(int(batch.lengths.sum()) for batch in work.batches)
    computed = sum(batch.seqs[..., 0].numel() for batch in work.batches)
    assert rates.padded_share == pytest.approx(1 - valid / computed)
