from __future__ import annotations

import errno
import json
import os
import resource
import stat
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from seamless_w2vbert.dumping import formats
from seamless_w2vbert.dumping.formats import (
    Layout,
    base,
    npy,
    open_reader,
    open_writer,
    parquet,
    safetensors,
)
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError, DumpError

DIM = 6

CASES = [
    (name, dtype) for name, format in formats.FORMATS.items() for dtype in format.dtypes
]

ODD_IDS = [
    "utt-1",
    "speaker/session/ütt 1.wav",
    "..",
    ".",
    ".hidden",
    "/etc/passwd",
    "",
    "%",
    "%2F",
    "a#17",
    "a",
    "A",
    "ä",
    "a~b+c",
    "nul\0byte\n",
    "__metadata__",
    "__metadata__#",
    "x" * 300,
    "x" * 299 + "y",
    "日本語" * 60,
    "CON",
    "shard",
]


def tensor(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def arrays_of(layout: Layout, frames: int, seed: int = 0) -> dict[int, torch.Tensor]:
    shape = (layout.dim,) if layout.pooled else (frames, layout.dim)
    return {
        layer: tensor(*shape, dtype=layout.dtype, seed=1000 * seed + layer)
        for layer in layout.layers
    }


def write(folder: Path, name: str, layout: Layout, utterances) -> SimpleNamespace:
    """Write (id, arrays) pairs and open what was written."""
    writer = open_writer(name, folder, layout)
    offsets = [writer.add(id, arrays, {}) for id, arrays in utterances]
    path = writer.close()
    return SimpleNamespace(
        path=path, offsets=offsets, reader=open_reader(name, path, layout)
    )


def same(actual: np.ndarray, expected: torch.Tensor) -> bool:
    """Compare bits; bfloat16 is expected as the float32 of the same value."""
    if expected.dtype == torch.bfloat16:
        expected = expected.float()
    wanted = expected.numpy()
    return (
        actual.dtype == wanted.dtype
        and actual.shape == wanted.shape
        and actual.tobytes() == wanted.tobytes()
    )


# -- every format --------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(3,), (17, 4)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("pooled", [False, True], ids=["frames", "pooled"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_what_is_written_is_read_bit_for_bit_whatever_its_id(
    tmp_path, name, dtype, pooled, layers
):
    layout = Layout(layers, DIM, dtype, pooled)
    frames = [1 + 3 * n % 5 for n in range(len(ODD_IDS))]
    utterances = [
        (id, arrays_of(layout, n, seed))
        for seed, (id, n) in enumerate(zip(ODD_IDS, frames, strict=True))
    ]

    shard = write(tmp_path, name, layout, utterances)

    # Read backwards, so that nothing depends on the order.
    for (id, arrays), n, offset in reversed(
        list(zip(utterances, frames, shard.offsets, strict=True))
    ):
        for layer in layers:
            assert same(shard.reader.read(id, layer, offset, n), arrays[layer]), id
    assert shard.path.parent == tmp_path
    shard.reader.check(list(zip(ODD_IDS, frames, strict=True)), shard.offsets)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_some_frames_of_an_utterance_can_be_read(tmp_path, name, dtype):
    layout = Layout((3,), DIM, dtype)
    arrays = arrays_of(layout, 9)
    shard = write(
        tmp_path, name, layout, [("first", arrays_of(layout, 2)), ("u", arrays)]
    )

    for start, stop in [(0, 4), (3, None), (8, 9), (2, 100)]:
        found = shard.reader.read("u", 3, shard.offsets[1], 9, start, stop)
        assert same(found, arrays[3][start:stop])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_values_at_the_edge_of_a_dtype_survive(tmp_path, name):
    # Subnormal, negative zero, smallest step, largest.
    values = torch.tensor([[1e-45, -0.0, 1 + 2**-23, 3.4028235e38, -1e-39, 0.0]])
    shard = write(tmp_path, name, Layout((1,), DIM, "float32"), [("u", {1: values})])

    assert same(shard.reader.read("u", 1, 0, 1), values)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_shard_in_which_nothing_was_embedded_can_be_written_and_opened(
    tmp_path, name
):
    shard = write(tmp_path, name, Layout((1, 2), DIM, "float32"), [])

    shard.reader.check([])
    with pytest.raises(DumpError):
        shard.reader.read("u", 1, 0, 1)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    ids=st.lists(st.text(max_size=90), unique=True, min_size=1, max_size=6),
    frames=st.lists(st.integers(1, 40), min_size=6, max_size=6),
    dim=st.integers(1, 9),
    case=st.sampled_from(CASES),
    group=st.integers(16, 2000),
)
def test_any_ids_and_shapes_are_read_as_they_were_written(
    tmp_path_factory, monkeypatch, ids, frames, dim, case, group
):
    name, dtype = case
    # Utterances share row groups, fill one, and are larger than one.
    monkeypatch.setattr(parquet, "GROUP_BYTES", group)
    layout = Layout((5, 6), dim, dtype)
    utterances = [
        (id, arrays_of(layout, n, seed))
        for seed, (id, n) in enumerate(zip(ids, frames, strict=False))
    ]

    shard = write(tmp_path_factory.mktemp("any"), name, layout, utterances)

    for (id, arrays), n, offset in zip(utterances, frames, shard.offsets, strict=False):
        for layer, expected in arrays.items():
            assert same(shard.reader.read(id, layer, offset, n), expected)
    shard.reader.check(list(zip(ids, frames, strict=False)), shard.offsets)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_what_a_caller_does_with_its_tensors_later_changes_nothing(tmp_path, name):
    layout = Layout((1,), DIM, "float32")
    batch = tensor(2, 4, DIM)
    expected = batch.clone()
    writer = open_writer(name, tmp_path, layout)

    # Views of one batch, as the encoder gives them; and one that is not contiguous.
    offsets = [writer.add(str(n), {1: batch[n]}, {}) for n in range(2)]
    offsets.append(writer.add("across", {1: batch[0].T[:, :].T[:, :DIM]}, {}))
    batch.zero_()
    reader = open_reader(name, writer.close(), layout)

    for n in range(2):
        assert same(reader.read(str(n), 1, offsets[n], 4), expected[n])
    assert same(reader.read("across", 1, offsets[2], 4), expected[0])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_what_is_read_cannot_be_written_to(tmp_path, name):
    for layout in (Layout((1,), DIM, "float32"), Layout((1,), DIM, "float32", True)):
        folder = tmp_path / str(layout.pooled)
        folder.mkdir()
        shard = write(folder, name, layout, [("u", arrays_of(layout, 4))])
        with pytest.raises(ValueError, match="read-only"):
            shard.reader.read("u", 1, 0, 4)[...] = 0


@pytest.mark.parametrize("name", formats.FORMATS)
@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({1: tensor(4, DIM + 1)}, r"shape \(4, 6\), but is float32 of \(4, 7\)"),
        ({1: tensor(DIM)}, r"but is float32 of \(6,\)"),
        ({1: tensor(4, DIM).half()}, "must be float32.* is float16"),
        ({1: tensor(0, DIM)}, r"of \(0, 6\)"),
        ({2: tensor(4, DIM)}, r"layers \[1\] were expected, but there are \[2\]"),
        ({1: torch.full((4, DIM), torch.nan)}, "NaN or infinite"),
        ({1: tensor(4, DIM).index_fill(0, torch.tensor(3), torch.inf)}, "NaN or inf"),
    ],
    ids=["dim", "rank", "dtype", "no frames", "layer", "nan", "inf"],
)
def test_arrays_that_are_not_as_announced_are_refused_and_leave_no_trace(
    tmp_path, name, arrays, says
):
    layout = Layout((1,), DIM, "float32")
    writer = open_writer(name, tmp_path, layout)
    good = [arrays_of(layout, 2, seed) for seed in range(2)]
    offsets = [writer.add("before", good[0], {})]

    with pytest.raises(DumpError, match=says) as caught:
        writer.add("bad", arrays, {})

    assert "bad" in str(caught.value)
    offsets.append(writer.add("after", good[1], {}))
    reader = open_reader(name, writer.close(), layout)
    reader.check([("before", 2), ("after", 2)], offsets)
    assert same(reader.read("after", 1, offsets[1], 2), good[1][1])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_id_that_occurs_twice_or_is_not_unicode_is_refused(tmp_path, name):
    layout = Layout((1,), DIM, "float32")
    writer = open_writer(name, tmp_path, layout)
    writer.add("u", arrays_of(layout, 2), {})

    with pytest.raises(DumpError, match="u: this id occurs twice"):
        writer.add("u", arrays_of(layout, 2), {})
    with pytest.raises(DumpError, match="valid Unicode"):
        writer.add(os.fsdecode(b"caf\xe9.wav"), arrays_of(layout, 2), {})
    open_reader(name, writer.close(), layout).check([("u", 2)])


@pytest.mark.parametrize("name", ["parquet", "npy", "fairseq"])
def test_bfloat16_is_refused_where_the_format_lacks_it_with_a_way_out(tmp_path, name):
    with pytest.raises(ArgumentError, match=f"{name} has no bfloat16.*safetensors"):
        open_writer(name, tmp_path, Layout((1,), DIM, "bfloat16"))
    with pytest.raises(ArgumentError, match=f"{name} has no bfloat16.*safetensors"):
        formats.check_dtype(name, "bfloat16")


def test_an_unknown_format_or_dtype_is_refused_with_those_there_are():
    with pytest.raises(ArgumentError, match="parquet, safetensors, npy, fairseq"):
        formats.find_format("hdf5")
    with pytest.raises(ArgumentError, match="float32, float16, bfloat16"):
        formats.check_dtype("npy", "float64")


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_disk_that_takes_no_more_is_an_error_with_the_systems_number(tmp_path, name):
    layout = Layout((1,), 64, "float32")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = open_writer(name, tmp_path, layout)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError) as caught:  # noqa: PT011, PT012
            for n in range(100):
                writer.add(str(n), {1: tensor(500, 64)}, {})
            writer.close()
        writer.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("name", formats.FORMATS)
def test_others_may_read_what_the_umask_lets_them(tmp_path, name):
    umask = os.umask(0o022)
    try:
        shard = write(
            tmp_path,
            name,
            Layout((1,), DIM, "float32"),
            [("u", {1: tensor(2, DIM)})],
        )
    finally:
        os.umask(umask)

    files = [shard.path, *shard.path.rglob("*")]
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444 for file in files)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_shard_that_differs_from_the_index_is_told(tmp_path, name):
    layout = Layout((1, 2), DIM, "float32")
    shard = write(
        tmp_path,
        name,
        layout,
        [(id, arrays_of(layout, n)) for id, n in [("a", 3), ("b", 4)]],
    )
    shard.reader.check([("a", 3), ("b", 4)])

    for rows in (
        [("a", 3)],
        [("a", 3), ("b", 4), ("c", 1)],
        [("a", 3), ("b", 5)],
        [("a", 4), ("b", 3)],
    ):
        with pytest.raises(DumpError, match=f"{shard.path}"):
            shard.reader.check(rows)
    if name != "fairseq":  # which has no ids
        with pytest.raises(DumpError, match=f"{shard.path}"):
            shard.reader.check([("a", 3), ("x", 4)])
    with pytest.raises(DumpError, match="b is at"):
        shard.reader.check([("a", 3), ("b", 4)], [0, 5])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_missing_or_damaged_shard_is_an_error_that_names_it(tmp_path, name):
    layout = Layout((1,), DIM, "float32")
    shard = write(tmp_path, name, layout, [("u", arrays_of(layout, 400))])
    file = shard.path if shard.path.is_file() else next(shard.path.glob("*.npy"))
    content = file.read_bytes()

    def read() -> None:
        open_reader(name, shard.path, layout).read("u", 1, 0, 400)

    read()
    for damaged in (content[:-100], content[:20], b"", b"\xff" * 1000):
        file.write_bytes(damaged)
        with pytest.raises(DumpError, match=f"{shard.path}.*verify"):
            read()
    file.unlink()
    with pytest.raises(DumpError, match=f"{shard.path}.*not there.*verify"):
        read()


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_shard_of_another_dtype_than_the_settings_say_is_not_read_as_numbers(
    tmp_path, name
):
    shard = write(
        tmp_path,
        name,
        Layout((1,), DIM, "float16"),
        [("u", {1: tensor(4, DIM).half()})],
    )

    with pytest.raises(DumpError, match=f"{shard.path}"):
        open_reader(name, shard.path, Layout((1,), DIM, "float32")).read("u", 1, 0, 4)


# -- mapped --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["safetensors", "npy", "fairseq"])
def test_arrays_are_parts_of_the_file_in_memory(tmp_path, name):
    layout = Layout((1,), 64, "float32")
    shard = write(tmp_path, name, layout, [("u", arrays_of(layout, 1000))])

    found = shard.reader.read("u", 1, 0, 1000, 100, 900)

    assert isinstance(found, np.memmap)
    assert not found.flags.owndata
    # What is written to the file is seen in the array.
    file = shard.path if shard.path.is_file() else next(shard.path.glob("*.npy"))
    with open(file, "r+b") as opened:
        opened.seek(file.stat().st_size - 100 * 64 * 4 - 4)
        opened.write(struct.pack("<f", 7.5))
    assert found[-1, -1] == 7.5


@pytest.mark.parametrize("name", ["safetensors", "npy", "fairseq"])
def test_a_caller_who_keeps_every_array_does_not_run_out_of_descriptors(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(base, "_MAX_MAPS", 10 + len(base._maps))
    layout = Layout((1,), 64, "float32")
    before = len(os.listdir("/proc/self/fd"))
    kept = []

    for n in range(40):
        folder = tmp_path / str(n)
        folder.mkdir()
        arrays = arrays_of(layout, 300, n)
        shard = write(folder, name, layout, [("u", arrays)])
        kept.append((shard.reader.read("u", 1, 0, 300), arrays[1]))
        del shard

    assert len(os.listdir("/proc/self/fd")) - before < 16
    assert all(same(found, expected) for found, expected in kept)


# -- Parquet -------------------------------------------------------------------------


@pytest.fixture(params=["float32", "float16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["frames", "pooled"])
def table(request, dtype, tmp_path) -> SimpleNamespace:
    """A Parquet shard with two layers and carried columns."""
    layout = Layout(
        (17, 24),
        DIM,
        dtype,
        request.param,
        {"text": pa.string(), "speaker": pa.int64()},
    )
    writer = open_writer("parquet", tmp_path, layout)
    expected, frames = {}, {"a": 3, "b/ü": 1, "c": 5}
    for seed, (id, n) in enumerate(frames.items()):
        expected[id] = arrays_of(layout, n, seed)
        columns = {"text": None if id == "a" else f"said {id}", "speaker": seed}
        writer.add(id, expected[id], columns, frames=n)
    rows = [(id, layer) for id in expected for layer in (17, 24)]
    return SimpleNamespace(
        path=writer.close(),
        rows=rows,
        frames=[frames[id] for id, _ in rows],
        arrays=[expected[id][layer].numpy() for id, layer in rows],
        dtype=dtype,
        pooled=request.param,
    )


def test_pyarrow_reads_a_row_for_each_utterance_and_layer(table):
    found = pq.read_table(table.path)

    assert found.column_names == [
        *("id", "layer", "frames", "embedding", "text", "speaker")
    ]
    assert found["id"].to_pylist() == [id for id, _ in table.rows]
    assert found["layer"].to_pylist() == [layer for _, layer in table.rows]
    assert found["frames"].to_pylist() == table.frames
    assert found["text"].to_pylist()[1:4] == [None, "said b/ü", "said b/ü"]
    assert found["speaker"].to_pylist() == [0, 0, 1, 1, 2, 2]
    value = {"float32": pa.float32(), "float16": pa.float16()}[table.dtype]
    type_ = found.schema.field("embedding").type
    vector = type_ if table.pooled else type_.value_type
    assert pa.types.is_fixed_size_list(vector)
    assert (vector.value_type, vector.list_size) == (value, DIM)
    for row, expected in zip(found["embedding"].to_pylist(), table.arrays, strict=True):
        assert np.array_equal(np.array(row, table.dtype), expected)


def test_pandas_reads_the_vectors_as_numpy_arrays_of_the_dtype(table):
    pandas = pytest.importorskip("pandas")

    found = pandas.read_parquet(table.path)

    assert found["id"].tolist() == [id for id, _ in table.rows]
    for row, expected in zip(found["embedding"], table.arrays, strict=True):
        array = row if table.pooled else np.stack(row)
        assert array.dtype == table.dtype
        assert np.array_equal(array, expected)


def test_polars_reads_the_vectors_as_arrays_of_the_dtype(table):
    polars = pytest.importorskip("polars")

    found = polars.scan_parquet(table.path).filter(polars.col("layer") == 24).collect()

    assert found["id"].to_list() == ["a", "b/ü", "c"]
    for row, expected in zip(found["embedding"], table.arrays[1::2], strict=True):
        assert row.to_numpy().dtype == table.dtype
        assert np.array_equal(row.to_numpy(), expected)


def test_duckdb_reads_the_values_exactly_as_float(table):
    duckdb = pytest.importorskip("duckdb")

    # float16, which it lacks, becomes FLOAT.
    found = duckdb.sql(
        f"select id, typeof(embedding), embedding, text from '{table.path}' "
        "where layer = 24 order by speaker"
    ).fetchall()

    assert [row[0] for row in found] == ["a", "b/ü", "c"]
    assert found[0][1] == ("FLOAT[]" if table.pooled else "FLOAT[][]")
    assert [row[3] for row in found] == [None, "said b/ü", "said c"]
    for row, expected in zip(found, table.arrays[1::2], strict=True):
        assert np.array_equal(np.array(row[2]), expected.astype(np.float64))


def test_datasets_reads_the_values_exactly_as_float32(table, tmp_path):
    datasets = pytest.importorskip("datasets")

    found = datasets.Dataset.from_parquet(
        str(table.path), cache_dir=str(tmp_path / "cache")
    )

    # It keeps the type of float16, but its formatters make float32 of any float.
    value = found.features["embedding"].feature
    value = value if table.pooled else value.feature
    assert value.dtype == table.dtype
    assert found["id"] == [id for id, _ in table.rows]
    for row, expected in zip(found.with_format("numpy"), table.arrays, strict=True):
        assert row["embedding"].dtype == np.float32
        assert np.array_equal(row["embedding"], expected)
    for row, expected in zip(found.with_format("torch"), table.arrays, strict=True):
        assert torch.equal(
            row["embedding"], torch.from_numpy(expected).to(torch.float32)
        )


def test_parquet_is_plain_and_its_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 4000)
    layout = Layout((1,), 10, "float32")
    frames = [30, 30, 30, 30, 300, 99, 1, 1]

    shard = write(
        tmp_path,
        "parquet",
        layout,
        [(str(n), arrays_of(layout, count, n)) for n, count in enumerate(frames)],
    )

    metadata = pq.ParquetFile(shard.path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    # 100 frames fill one; the utterance of 300 has one to itself.
    assert [group.num_rows for group in groups] == [3, 1, 1, 2, 1]
    for group in groups:
        column = group.column(3)
        assert column.path_in_schema.startswith("embedding")
        assert column.compression == "UNCOMPRESSED"
        assert not any("DICTIONARY" in encoding for encoding in column.encodings)
        assert "PLAIN" in column.encodings


def test_reading_in_order_decodes_every_row_group_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 4000)
    layout = Layout((1, 2), 10, "float32")
    utterances = [(str(n), arrays_of(layout, 30, n)) for n in range(20)]
    shard = write(tmp_path, "parquet", layout, utterances)
    decoded = []
    decode = shard.reader._decode
    monkeypatch.setattr(
        shard.reader, "_decode", lambda number: decoded.append(number) or decode(number)
    )

    for (id, arrays), offset in zip(utterances, shard.offsets, strict=True):
        for layer in (1, 2):
            assert same(shard.reader.read(id, layer, offset, 30), arrays[layer])

    groups = pq.ParquetFile(shard.path).metadata.num_row_groups
    assert groups == 14
    assert decoded == list(range(groups))
    decoded.clear()
    shard.reader.read("7", 1, shard.offsets[7], 30)
    assert decoded == [14 // 3]


def test_an_array_that_is_kept_does_not_keep_its_row_group(tmp_path):
    layout = Layout((1,), DIM, "float32")
    shard = write(tmp_path, "parquet", layout, [("u", arrays_of(layout, 4))])

    array = shard.reader.read("u", 1, 0, 4)

    assert array.base is None or array.base.nbytes == array.nbytes


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("name", ["parquet", "fairseq"])
def test_a_writer_holds_no_more_than_a_row_group(tmp_path, monkeypatch, name):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 2**22)
    layout = Layout((1,), 1024, "float32")
    arrays = arrays_of(layout, 500)  # 2 MB
    writer = open_writer(name, tmp_path, layout)
    used = []

    for n in range(50):
        writer.add(str(n), arrays, {})
        used.append(resident())

    path = writer.close()
    size = sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
    assert size > 100e6
    # A group of 4 MB, and what Parquet makes of it meanwhile.
    assert max(used) - used[0] < 50e6


def test_a_row_larger_than_parquet_can_hold_is_refused_before_it_is_written(tmp_path):
    # 3 hours of float32: pyarrow fails at the end of such a page. This is one vector,
    # seen as many, so that the test does not need the memory.
    three_hours = torch.zeros(1, 1).expand(540_000, 1024)
    writer = open_writer("parquet", tmp_path, Layout((1,), 1024, "float32"))

    with pytest.raises(DumpError, match=r"long: has 2\.1 GiB.*float16.*safetensors"):
        writer.add("long", {1: three_hours}, {})

    writer.add("short", {1: tensor(2, 1024)}, {})
    open_reader("parquet", writer.close(), Layout((1,), 1024, "float32")).check(
        [("short", 2)]
    )


def test_a_carried_column_must_have_its_type_and_a_name_that_is_free(tmp_path):
    layout = Layout((1,), DIM, "float32", columns={"speaker": pa.int64()})
    writer = open_writer("parquet", tmp_path, layout)

    with pytest.raises(DumpError, match=r"u: column 'speaker' is int64.*'Anna'"):
        writer.add("u", arrays_of(layout, 2), {"speaker": "Anna"})
    writer.add("u", arrays_of(layout, 2), {"speaker": 3})

    assert pq.read_table(writer.close())["speaker"].to_pylist() == [3]
    with pytest.raises(ArgumentError, match=r"'layer'.*rename"):
        open_writer(
            "parquet",
            tmp_path,
            Layout((1,), DIM, "float32", columns={"layer": pa.int64()}),
        )


# -- safetensors ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", formats.FORMATS["safetensors"].dtypes)
def test_safetensors_own_loader_reads_the_tensors_by_id(tmp_path, dtype):
    ids = ["a", "b/ü", "__metadata__"]
    one = Layout((17,), DIM, dtype)
    two = Layout((17, 24), DIM, dtype)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    arrays = {id: arrays_of(two, 3, seed) for seed, id in enumerate(ids)}

    single = write(
        tmp_path / "one",
        "safetensors",
        one,
        [(id, {17: of_id[17]}) for id, of_id in arrays.items()],
    )
    several = write(tmp_path / "two", "safetensors", two, list(arrays.items()))

    found = load_file(single.path)
    assert set(found) == {"a", "b/ü", "__metadata__#"}
    assert torch.equal(found["b/ü"], arrays["b/ü"][17])
    found = load_file(several.path)
    assert set(found) == {f"{id}#{layer}" for id in ids for layer in (17, 24)}
    assert torch.equal(found["__metadata__#24"], arrays["__metadata__"][24])
    assert found["a#17"].dtype == getattr(torch, dtype)
    raw = single.path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}


@given(st.lists(st.text(alphabet="_#metada1", max_size=14), unique=True, max_size=30))
def test_tensor_names_differ_where_ids_or_layers_do(ids):
    ids = [*ids, "__metadata__", "__metadata__#", "a", "a#1"]
    ids = list(dict.fromkeys(ids))
    for layers in ((1,), (1, 11)):
        layout = Layout(layers, DIM, "float32")
        names = [safetensors.tensor_name(id, k, layout) for id in ids for k in layers]
        assert len(set(names)) == len(names)
        assert "__metadata__" not in names


def test_more_names_than_a_safetensors_header_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_MAX_HEADER", 3000)
    layout = Layout((1,), DIM, "float32")
    writer = open_writer("safetensors", tmp_path, layout)
    added = []

    with pytest.raises(DumpError, match="smaller shards"):  # noqa: PT012
        for n in range(100):
            writer.add(f"utterance-ü-{n}", arrays_of(layout, 1), {})
            added.append(f"utterance-ü-{n}")

    path = writer.close()
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length <= 3000
    assert set(load_file(path)) == set(added)


def test_a_safetensors_header_that_points_outside_of_the_file_is_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2, DIM], "data_offsets": [8, 8 + 8 * DIM]}
    header = json.dumps({"u": entry}).encode()
    file = tmp_path / "shard.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 * DIM))

    reader = open_reader("safetensors", file, Layout((1,), DIM, "float32"))

    with pytest.raises(DumpError, match=f"{file}.*'u'"):
        reader.read("u", 1, 0, 2)


# -- npy -----------------------------------------------------------------------------


def test_npy_files_are_named_after_their_ids_and_load_with_numpy(tmp_path):
    layout = Layout((17,), DIM, "float16")
    arrays = {
        id: arrays_of(layout, 3, seed) for seed, id in enumerate(["utt-1", "a/ü"])
    }

    shard = write(tmp_path, "npy", layout, list(arrays.items()))

    assert sorted(os.listdir(shard.path)) == ["a%2F%C3%BC.npy", "utt-1.npy"]
    for file in shard.path.iterdir():
        expected = arrays[unquote(file.stem)][17]
        assert same(np.load(file), expected)


def test_npy_files_of_several_layers_are_named_after_them(tmp_path):
    layout = Layout((17, 24), DIM, "float32")
    arrays = arrays_of(layout, 3)

    shard = write(tmp_path, "npy", layout, [("utt", arrays)])

    assert sorted(os.listdir(shard.path)) == ["utt#17.npy", "utt#24.npy"]
    assert same(np.load(shard.path / "utt#24.npy"), arrays[24])


def test_npy_files_of_ids_that_differ_in_case_differ_in_more(tmp_path):
    layout = Layout((1,), DIM, "float32")
    ids = ["Utt", "utt", "UTT", "ä", "Ä"]

    shard = write(tmp_path, "npy", layout, [(id, arrays_of(layout, 1)) for id in ids])

    names = Counter(name.lower() for name in os.listdir(shard.path))
    assert len(names) == len(ids)


@given(st.text(max_size=200), st.text(max_size=200))
def test_npy_names_suit_any_file_system_and_give_back_the_id(one, other):
    assume(one != other)
    names = [npy.file_name(one), npy.file_name(other)]

    assert names[0] != names[1]
    for id, name in zip((one, other), names, strict=True):
        assert 0 < len((name + "#24.npy").encode()) <= 255
        assert not set(name) & set('/\\:*?"<>|~# ')
        assert not name.startswith(".")
        if "+" not in name and id:
            assert unquote(name) == id
        assert npy.unique_name(id) not in names or "+" in name


# -- fairseq -------------------------------------------------------------------------


def fairseq_features(folder: Path, split: str, rank: int, num_shards: int):
    """Read features as fairseq's `dump_km_label.py` does."""
    lengths = [
        int(line.rstrip())
        for line in open(f"{folder}/{split}_{rank}_{num_shards}.len")  # noqa: SIM115
    ]
    features = np.load(f"{folder}/{split}_{rank}_{num_shards}.npy", mmap_mode="r")
    offsets = [0, *np.cumsum(lengths[:-1]).tolist()]
    assert features.shape[0] == offsets[-1] + lengths[-1]
    for offset, length in zip(offsets, lengths, strict=True):
        yield features[offset : offset + length]


@pytest.mark.parametrize("pooled", [False, True])
def test_fairseqs_scripts_read_the_shards_by_the_names_they_ask_for(tmp_path, pooled):
    layout = Layout((17, 24), DIM, "float16", pooled)
    store = Store(tmp_path / "dump")
    store.create()
    expected = [
        [arrays_of(layout, 1 + n, 10 * rank + n) for n in range(4)] for rank in range(2)
    ]
    parts = []
    for rank, shard in enumerate(expected):
        with store.workspace() as folder:
            writer = open_writer("fairseq", folder, layout)
            for n, arrays in enumerate(shard):
                writer.add(str(n), arrays, {})
            store.put(writer.close(), f"data/shard-{rank}")
        names = [f"shard-{rank}/{k}.{s}" for k in (17, 24) for s in ("len", "npy")]
        parts.append(SimpleNamespace(files=dict.fromkeys(names)))
    parts.insert(1, SimpleNamespace(files={}))  # in which everything failed

    for _ in range(2):  # as when a dump is run again
        formats.finish("fairseq", store, "data", parts, layout)

    for rank, shard in enumerate(expected):
        found = fairseq_features(tmp_path / "dump/fairseq", "layer24", rank, 2)
        for array, arrays in zip(found, shard, strict=True):
            assert same(np.asarray(array), arrays[24].reshape(-1, DIM))


def test_a_fairseq_array_has_the_header_that_numpy_writes(tmp_path):
    layout = Layout((3,), DIM, "float32")
    arrays = [arrays_of(layout, n, n) for n in (3, 1, 4)]
    shard = write(
        tmp_path, "fairseq", layout, [(str(n), a) for n, a in enumerate(arrays)]
    )

    with open(shard.path / "3.npy", "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        header = np.lib.format.read_array_header_1_0(file)
        assert header == ((8, DIM), False, np.dtype("<f4"))
        assert file.tell() % 64 == 0
    assert (shard.path / "3.len").read_text() == "3\n1\n4\n"
    assert same(np.load(shard.path / "3.npy"), torch.cat([a[3] for a in arrays]))


def test_finishing_the_other_formats_adds_nothing(tmp_path):
    store = Store(tmp_path)

    for name in ("parquet", "safetensors", "npy"):
        formats.finish(name, store, "data", [], Layout((1,), DIM, "float32"))

    assert os.listdir(tmp_path) == []
