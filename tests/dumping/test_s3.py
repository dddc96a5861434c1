"""Sources and dumps in S3: a server that speaks its protocol, and s3fs before it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from command import COMMAND, run

from seamless_w2vbert import dump, merge_dumps, open_dump, verify_dump

SMALL = {"shard_seconds": 5.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The environment of processes that are to find the server."""
    log = tmp_path_factory.mktemp("s3") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"],
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield {
            "AWS_ENDPOINT_URL": found[0],
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def s3(server, monkeypatch):
    """The filesystem, with an empty bucket in it."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("bucket")
    yield fs
    fs.rm("bucket", recursive=True)


def assert_equal(found, expected):
    assert found.ids == expected.ids
    for id in expected.ids:
        np.testing.assert_array_equal(found[id], expected[id])


@pytest.mark.parametrize("format", ["parquet", "safetensors", "npy", "fairseq"])
def test_every_format_lies_in_s3_as_in_a_folder(s3, corpus, pipeline, tmp_path, format):
    s3.put(str(corpus), "bucket/corpus", recursive=True)
    out = f"s3://bucket/{format}"

    report = dump("s3://bucket/corpus", out, pipeline, format=format, **SMALL)
    dump(corpus, tmp_path / "d", pipeline, format=format, **SMALL)

    assert (report.embedded, report.failed) == (24, 0)
    assert_equal(open_dump(out), open_dump(tmp_path / "d"))
    found = verify_dump(out, sample=2, model="tiny-random")
    assert (found.embedded, found.sampled, found.problems) == (24, 2, ())
    assert dump("s3://bucket/corpus", out, pipeline, format=format, **SMALL).new == 0


def test_jobs_share_a_url_and_are_merged_there(s3, corpus, pipeline, tmp_path):
    for number in range(2):
        dump(
            corpus,
            "s3://bucket/jobs",
            pipeline,
            shard_index=number,
            num_shards=2,
            **SMALL,
        )
    dump(corpus, tmp_path / "d", pipeline, **SMALL)

    merge_dumps(["s3://bucket/jobs"], "s3://bucket/merged")

    merged, expected = open_dump("s3://bucket/merged"), open_dump(tmp_path / "d")
    assert sorted(merged.ids) == sorted(expected.ids)
    for id in expected.ids:
        np.testing.assert_allclose(merged[id], expected[id], atol=1e-5)
    assert verify_dump("s3://bucket/merged", sample=0).problems == ()


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [COMMAND, "dump", *map(str, arguments), "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


def test_killed_processes_leave_a_dump_in_s3_that_is_gone_on_with(
    s3, corpus, pipeline, tmp_path
):
    arguments = [corpus, "s3://bucket/d", "--shard-seconds", "3"]

    def committed() -> int:
        s3.invalidate_cache()
        return len(s3.find("bucket/d/index"))

    seen = [0]
    for _ in range(2):
        process = start(*arguments)
        while committed() == seen[-1]:
            assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
        assert process.returncode < 0
        seen.append(committed())

    assert seen == sorted(set(seen))  # each went on, and none came to the end
    assert run("dump", *arguments, "--quiet").returncode == 0
    dump(corpus, tmp_path / "d", pipeline, shard_seconds=3)
    assert_equal(open_dump("s3://bucket/d"), open_dump(tmp_path / "d"))
    assert verify_dump("s3://bucket/d", sample=0).problems == ()


def test_two_processes_on_one_url_do_not_spoil_each_others_work(
    s3, corpus, pipeline, tmp_path
):
    """What lies behind a URL cannot be locked; whoever is last, the dump is whole."""
    arguments = [corpus, "s3://bucket/d", "--shard-seconds", "5"]
    processes = [start(*arguments), start(*arguments)]

    for process in processes:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr

    dump(corpus, tmp_path / "d", pipeline, **SMALL)
    assert_equal(open_dump("s3://bucket/d"), open_dump(tmp_path / "d"))
    assert verify_dump("s3://bucket/d", sample=0).problems == ()


def test_what_another_process_adds_is_seen(s3, corpus, pipeline):
    """Filesystems keep listings for as long as a process lives."""
    out = "s3://bucket/d"
    first = sorted(corpus.glob("*/*.flac"))[0]
    s3.put(str(first), "bucket/corpus/a.flac")
    dump("s3://bucket/corpus", out, pipeline, **SMALL)
    assert open_dump(out).ids == ("a.flac",)

    elsewhere = fsspec.filesystem("s3", skip_instance_cache=True)
    elsewhere.put(str(first), "bucket/corpus/b.flac")
    assert run("dump", "s3://bucket/corpus", out, "--quiet").returncode == 0

    assert open_dump(out).ids == ("a.flac", "b.flac")
    assert dump("s3://bucket/corpus", out, pipeline, **SMALL).new == 0


def test_a_server_that_is_gone_is_one_clear_line(s3, corpus):
    gone = "http://127.0.0.1:9"
    result = run("dump", corpus, "s3://bucket/d", "--quiet", AWS_ENDPOINT_URL=gone)

    assert result.returncode == 1
    assert "s3://bucket/d" in result.stderr
    assert "Traceback" not in result.stderr
