"""Real processes killed, stopped and starved; what they leave is gone on from."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import COMMAND, run
from folders import files_of, small_disk

from seamless_w2vbert import DumpError, dump, open_dump, verify_dump
from seamless_w2vbert.cli.dump import describe
from seamless_w2vbert.dumping.run import Progress

FIFTY_KILLS = """
import os, random, signal, sys, time, traceback, warnings
warnings.simplefilter("ignore")
import pyarrow.parquet
from seamless_w2vbert import dump, stack
stack.load()
source, expected, out = sys.argv[1:]

def start(folder):
    pid = os.fork()
    if pid == 0:
        try:
            dump(source, folder, "tiny-random", layers=(1, 3), shard_seconds=0.1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def committed(folder):
    try:
        return len(os.listdir(folder + "/index"))
    except FileNotFoundError:
        return 0

# How long a run takes before its first shard, and from shard to shard.
begun = time.monotonic()
pid = start(expected)
while not committed(expected):
    time.sleep(0.001)
first = time.monotonic() - begun
assert os.waitpid(pid, 0)[1] == 0
each = (time.monotonic() - begun - first) / committed(expected)

random.seed(11)
kills, unfinished = 0, []
while kills < 50:
    there = committed(out)
    pid = start(out)
    if kills % 3:  # while shards are embedded and written
        while committed(out) == there:
            time.sleep(0.0005)
        time.sleep(random.uniform(0, 2 * each))
    else:  # on the way there
        time.sleep(random.uniform(0, first))
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    kills += 1
    unfinished.append(committed(out))
assert os.waitpid(start(out), 0)[1] == 0
print(kills, len(set(unfinished)), unfinished[-1])
"""


def test_fifty_kills_leave_the_dump_of_an_uninterrupted_run(speech, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    samples = speech.samples.numpy()
    for number in range(200):
        start, length = 400 * number, 6000 + 160 * (number % 7)
        soundfile.write(source / f"{number:03}.wav", samples[start:][:length], 16000)

    folders = [str(tmp_path / name) for name in ("expected", "out")]
    result = subprocess.run(
        [sys.executable, "-c", FIFTY_KILLS, str(source), *folders],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    kills, moments, last = map(int, result.stdout.split())

    assert kills == 50
    # They fell at many different points of the dump, all before its end.
    assert moments > 25
    assert last < 200
    expected, out = map(Path, folders)
    assert files_of(out) == files_of(expected)
    assert json.loads((out / "dump.json").read_text())["complete"]
    assert len(open_dump(out, layer=3)) == 200
    assert verify_dump(str(out), sample=3).problems == ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_shard_at_hand(speech, tmp_path, number):
    scp = tmp_path / "wav.scp"
    soundfile.write(tmp_path / "long.wav", np.tile(speech.samples, 40), 16000)
    scp.write_text(f"long {tmp_path / 'long.wav'}\n")
    (tmp_path / "segments").write_text(
        "".join(f"utt-{n:04} long {n / 10:.1f} {n / 10 + 1:.1f}\n" for n in range(2000))
    )
    arguments = ["dump", scp, tmp_path / "d", "--shard-seconds", "10"]
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("d/index/part-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]

    assert process.returncode == 1
    assert f"{number.name}: finishing the shard at hand" in stderr
    assert "run the same command again" in stderr
    with pytest.warns(UserWarning, match="not complete"):
        part = open_dump(tmp_path / "d")
    assert 0 < len(part) < 2000
    assert len(part) % 10 == 0 or len(part) % 9 == 0
    assert verify_dump(str(tmp_path / "d"), sample=0).problems == (
        f"{tmp_path / 'd'}: is not complete; run the same dump again to go on",
    )


def test_a_full_disk_loses_nothing_that_was_written(corpus, pipeline, tmp_path):
    disk = tmp_path / "disk"
    if not small_disk(disk):
        pytest.skip("file systems can only be mounted by root")

    options = {"layers": (1, 2, 3), "shard_seconds": 3.0}
    try:
        with pytest.raises(DumpError, match="No space left on device"):
            dump(corpus, disk / "d", pipeline, **options)
        with pytest.warns(UserWarning, match="not complete"):
            part = open_dump(disk / "d", layer=3)
        before = {id: np.array(part[id]) for id in part.ids}
        assert 0 < len(before) < 24

        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        report = dump(corpus, disk / "d", pipeline, **options)
        assert (report.utterances, report.new) == (24, 24 - len(before))
        opened = open_dump(disk / "d", layer=3)
        assert all(np.array_equal(opened[id], before[id]) for id in before)
        assert verify_dump(str(disk / "d"), sample=0).problems == ()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_limit_on_the_size_of_files_is_one_clear_line(corpus, tmp_path):
    result = subprocess.run(
        [str(COMMAND), "dump", str(corpus), str(tmp_path / "d")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (300_000, 300_000)
        ),
    )
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert "File too large" in lines[-1]
    assert "run the same command again" in lines[-1]
    assert "Traceback" not in result.stderr


def test_ten_thousand_utterances_take_no_more_memory_than_a_thousand(speech, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.tile(speech.samples, 20), 16000)
    (tmp_path / "wav.scp").write_text(f"long {tmp_path / 'long.wav'}\n")
    (tmp_path / "segments").write_text(
        "".join(
            f"utt-{n:05} long {n / 100:.2f} {n / 100 + 0.2 + n % 10 / 100:.2f}\n"
            for n in range(10_000)
        )
    )
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from seamless_w2vbert import dump
seen = {{}}
def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
def watch(progress):
    if progress.done in (2000, 10_000):
        seen[progress.done] = memory()
report = dump({str(tmp_path)!r}, {str(tmp_path / "d")!r}, "tiny-random",
              shard_seconds=100.0, progress=watch)
assert (report.embedded, report.failed) == (10_000, 0), report
print(seen[2000], seen[10_000])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert result.returncode == 0, result.stderr
    early, late = map(float, result.stdout.split())

    # Their embeddings are 60 MB.
    assert late - early < 30
    assert len(open_dump(tmp_path / "d")) == 10_000


RAY = """
import glob, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
import ray
from seamless_w2vbert import dump
source, out = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
         logging_level="ERROR")
killed = []

def parents(pid):
    while pid > 1:
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
        yield pid

def workers():
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        pid = int(path.split("/")[2])
        try:
            with open(path) as file:
                # Of this Ray: another may run on the machine.
                if file.read().startswith("ray::MapWorker"):
                    if os.getpid() in parents(pid):
                        yield pid
        except OSError:
            pass

def kill():
    while len(glob.glob(out + "/index/part-*")) < 5:
        time.sleep(0.01)
    there = sorted(workers())
    os.kill(there[0], signal.SIGKILL)
    killed.append((there, len(glob.glob(out + "/index/part-*"))))

thread = threading.Thread(target=kill, daemon=True)
thread.start()
report = dump(source, out, "tiny-random", layers=(1, 3), shard_seconds=0.1,
              engine="ray", workers=2)
thread.join(5)
assert report.complete and report.failed == 0, report
((there, done),) = killed
print("RESULT", len(there), done, report.embedded)
"""


def test_ray_with_a_killed_worker_dumps_what_one_process_does(speech, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (extra: ray)")
    source = tmp_path / "in"
    source.mkdir()
    samples = speech.samples.numpy()
    for number in range(40):
        soundfile.write(
            source / f"{number:02}.wav", samples[1000 * number :][:16000], 16000
        )

    result = subprocess.run(
        [sys.executable, "-c", RAY, str(source), str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # Ray's own processes write here too.
    (line,) = (row for row in result.stdout.splitlines() if row.startswith("RESULT"))
    workers, done, embedded = map(int, line.split()[1:])
    assert (workers, embedded) == (2, 40)
    assert done < 40

    dump(source, tmp_path / "local", "tiny-random", layers=(1, 3), shard_seconds=0.1)
    ours = open_dump(tmp_path / "ray", layer=3)
    local = open_dump(tmp_path / "local", layer=3)
    assert ours.ids == local.ids
    for id in local.ids:
        difference = np.abs(ours[id] - local[id]).max()
        assert difference < 1e-5 * np.abs(local[id]).max()
    assert verify_dump(str(tmp_path / "ray"), sample=2).problems == ()


# -- the command -----------------------------------------------------------------------


def test_the_command_dumps_verifies_and_goes_on(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    for path in sorted(corpus.rglob("*.flac"))[:5]:
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "bad.wav").write_bytes(b"no audio")
    out = tmp_path / "d"

    result = run("dump", tmp_path / "in", out, "--layers", "2,3", "--pool", "mean")
    assert result.returncode == 3, result.stderr
    assert "6 utterances: 5 embedded" in result.stdout
    assert "1 of 6 utterances failed" in result.stderr
    assert "x real time" in result.stdout

    again = run("dump", tmp_path / "in", out, "--layers", "2,3", "--pool", "mean")
    assert again.returncode == 3
    assert "this run" not in again.stdout

    other = run("dump", tmp_path / "in", out, "--layers", "1", "--quiet")
    assert (other.returncode, other.stdout) == (1, "")
    assert "holds a dump of other settings" in other.stderr

    checked = run("verify", out, "--sample", "3")
    assert checked.returncode == 0, checked.stderr
    assert "3 embedded again" in checked.stdout


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(corpus, tmp_path):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "dump", str(corpus), str(tmp_path / "d"), "--max-frames", "300"],
        stdout=slave,
        stderr=slave,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the other end has closed
        while data := os.read(master, 4096):
            shown += data
    assert process.wait() == 0
    text = shown.decode()
    assert "24/24 utterances" in text
    assert "h of audio" in text
    assert "x real time, 0 failed, 0:00:00 left" in text

    progress = Progress(
        total=100,
        done=40,
        failed=1,
        audio_seconds=7200,
        new=20,
        new_audio_seconds=3600,
        elapsed=60,
    )
    assert describe(progress) == (
        "40/100 utterances, 2.00 h of audio, 60.0 x real time, 1 failed, 0:03:00 left"
    )


def test_the_command_shows_a_plan_and_merges_jobs(corpus, tmp_path):
    paths = "".join(f"{path}\n" for path in sorted(corpus.rglob("*.flac")))

    planned = run("dump", "-", tmp_path / "no", "--dry-run", stdin=paths)
    assert planned.returncode == 0, planned.stderr
    assert "utterances   24" in planned.stdout
    assert not (tmp_path / "no").exists()

    for index in (0, 1):
        share = ["--shard-index", index, "--num-shards", 2, "--quiet"]
        result = run("dump", "-", tmp_path / "jobs", *share, stdin=paths)
        assert (result.returncode, result.stdout) == (0, ""), result.stderr

    merged = run("merge", tmp_path / "jobs", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    assert "24 utterances: 24 embedded" in merged.stdout
    assert len(open_dump(tmp_path / "merged")) == 24


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("dump", "no/such/folder", "out"), 2, "no/such/folder"),
        (("verify", "no/such/dump"), 1, "no/such/dump"),
        (("dump", ".", "out", "--shard-size", "big"), 2, "--shard-size"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, arguments, code, reason):
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == code
    assert reason in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
