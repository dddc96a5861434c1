from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from seamless_w2vbert.dumping import index, reader
from seamless_w2vbert.dumping.formats import FORMATS, open_writer
from seamless_w2vbert.dumping.reader import dump_stores, open_dump
from seamless_w2vbert.dumping.settings import Settings
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError, DumpError

DIM = 8

CASES = [(name, dtype) for name, form in FORMATS.items() for dtype in form.dtypes]


def make_dump(
    location: str | os.PathLike[str],
    ids=("c", "a/ü", "b", "bad", "d", "e"),
    *,
    failed=("bad",),
    per_shard: int = 2,
    complete: bool = True,
    seed: int = 0,
    **changed,
) -> SimpleNamespace:
    """Make a dump of random vectors; of ids that start alike, lengths are alike."""
    settings = Settings(
        **{
            "format": "parquet",
            "layers": (17,),
            "dtype": "float32",
            "pool": None,
            "dim": DIM,
            "chunk": None,
            "overlap": 0.0,
            "normalize": None,
            "model": "0" * 64,
            "compute_dtype": "float32",
            "columns": {"text": "string", "speaker": "int64"},
            **changed,
        }
    )
    store = Store(location)
    store.create()
    generator = torch.Generator().manual_seed(seed)
    arrays: dict[str, dict[int, torch.Tensor]] = {}
    info = {
        "version": 1,
        "complete": complete,
        "settings": settings.to_json(),
        "columns": dict(settings.columns),
        "runs": [],
    }
    store.write("dump.json", json.dumps(info).encode())

    for first in range(0, len(ids), per_shard):
        rows = []
        with store.workspace() as folder:
            writer = open_writer(settings.format, folder, settings.layout)
            name = f"shard-{first:012d}-0123abcd"
            if settings.format in ("parquet", "safetensors"):
                name += f".{settings.format}"
            for n, id in enumerate(ids[first : first + per_shard], start=first):
                carried = {"text": f"said {id}", "speaker": n}
                row = {"id": id, "source": f"/audio/{id}.wav", **carried}
                if id in failed:
                    row |= {"status": "failed", "error": f"{id}.wav: is empty."}
                else:
                    dim = settings.dim
                    shape = (20 + n, dim) if settings.pool is None else (dim,)
                    arrays[id] = {
                        layer: (3 + 2 * torch.randn(shape, generator=generator)).to(
                            getattr(torch, settings.dtype)
                        )
                        for layer in settings.layers
                    }
                    row |= {
                        "offset": writer.add(id, arrays[id], carried),
                        "status": "embedded",
                        "frames": 20 + n,
                        "samples": 320 * (20 + n) + 240,
                        "shard": name,
                    }
                rows.append(row)
            store.put(writer.close(), f"data/{name}")
        index.write_part(store, first, rows, settings.column_types, {name: {}}, {})

    return SimpleNamespace(store=store, arrays=arrays, settings=settings, path=location)


def write_statistics(location: Path, layers=(17,), frames: int = 100, **given) -> dict:
    rng = np.random.default_rng(frames)
    arrays = {"frames": np.int64(frames)}
    for layer in layers:
        arrays[f"mean_{layer}"] = rng.standard_normal(DIM)
        arrays[f"var_{layer}"] = rng.random(DIM) + 0.5
    np.savez(location / "statistics.npz", **(arrays | given))
    return arrays


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def assert_same(found: np.ndarray, expected: torch.Tensor) -> None:
    wanted = numpy_of(expected)
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)


@pytest.fixture(autouse=True)
def no_warnings():
    """A whole dump is opened without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# -- as a mapping --------------------------------------------------------------------


@pytest.mark.parametrize("pool", [None, "mean"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_dump_is_a_mapping_from_ids_to_arrays(tmp_path, name, dtype, pool):
    made = make_dump(tmp_path, format=name, dtype=dtype, pool=pool)

    dump = open_dump(tmp_path)

    assert isinstance(dump, Mapping)
    assert len(dump) == 5
    assert list(dump) == list(dump.ids) == ["c", "a/ü", "b", "d", "e"]
    for id, arrays in made.arrays.items():
        assert_same(dump[id], arrays[17])
    for (id, array), expected in zip(dump.items(), made.arrays, strict=True):
        assert id == expected
        assert_same(array, made.arrays[id][17])
    for array, arrays in zip(dump.values(), made.arrays.values(), strict=True):
        assert_same(array, arrays[17])
    assert dump.complete


def test_an_utterance_that_failed_is_not_in_the_dump_but_its_reason_is(tmp_path):
    make_dump(tmp_path)
    dump = open_dump(tmp_path)

    assert "bad" not in dump
    assert "c" in dump
    assert dump.get("bad") is None
    assert dump.failures == {"bad": "bad.wav: is empty."}
    with pytest.raises(KeyError, match=r"bad: was not embedded: bad\.wav: is empty"):
        dump["bad"]
    with pytest.raises(KeyError, match=r"^'unheard-of'$"):
        dump["unheard-of"]


def test_the_index_has_a_row_for_every_utterance_with_its_columns(tmp_path):
    make_dump(tmp_path)

    found = open_dump(tmp_path).index

    assert isinstance(found, pa.Table)
    assert found["id"].to_pylist() == ["c", "a/ü", "b", "bad", "d", "e"]
    assert found["frames"].to_pylist() == [20, 21, 22, None, 24, 25]
    assert found["speaker"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert found["source"][1].as_py() == "/audio/a/ü.wav"


def test_settings_and_dump_json_are_at_hand(tmp_path):
    made = make_dump(tmp_path)
    dump = open_dump(tmp_path)

    assert dump.settings["layers"] == [17]
    assert dump.info == json.loads((tmp_path / "dump.json").read_text())
    assert dump.info["settings"] == made.settings.to_json()
    assert "5 utterances" in repr(dump)


def test_dumps_are_compared_without_reading_them(tmp_path):
    make_dump(tmp_path)
    dump = open_dump(tmp_path)

    assert dump == dump
    assert dump != open_dump(tmp_path)
    assert len({dump, dump.layer(17)}) == 2


@pytest.mark.parametrize("name", ["safetensors", "npy", "fairseq"])
def test_arrays_are_mapped_where_the_format_allows(tmp_path, name):
    make_dump(tmp_path, ["u"], format=name, dim=1024)

    assert isinstance(open_dump(tmp_path)["u"], np.memmap)


def test_an_empty_dump_and_one_in_which_all_failed_have_no_utterances(tmp_path):
    make_dump(tmp_path / "empty", ids=[])
    make_dump(tmp_path / "failed", ids=["bad"])

    for name in ("empty", "failed"):
        dump = open_dump(tmp_path / name)
        assert len(dump) == 0
        assert list(dump.items()) == []
    assert dump.failures == {"bad": "bad.wav: is empty."}
    assert open_dump(tmp_path / "empty").index.column_names[-1] == "speaker"


# -- layers --------------------------------------------------------------------------


def test_of_several_layers_one_has_to_be_chosen(tmp_path):
    made = make_dump(tmp_path, layers=(17, 24))
    dump = open_dump(tmp_path)

    with pytest.raises(DumpError, match=r"layers 17 and 24; .*layer=24.*dump\.layer"):
        dump["c"]
    with pytest.raises(DumpError, match="layers 17 and 24"):
        dump.torch_dataset()
    with pytest.raises(DumpError, match="layers 17 and 24"):
        list(dump.values())
    assert "c" in dump
    assert_same(dump.layer(24)["c"], made.arrays["c"][24])
    assert_same(dump.layer(24).layer(17)["c"], made.arrays["c"][17])
    assert_same(open_dump(tmp_path, layer=17)["d"], made.arrays["d"][17])


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    make_dump(tmp_path, layers=(17, 24))

    with pytest.raises(ArgumentError, match="no layer 3; it has layers 17 and 24"):
        open_dump(tmp_path, layer=3)
    with pytest.raises(ArgumentError, match="no layer -1"):
        open_dump(tmp_path).layer(-1)


# -- slices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_has_the_frames_that_overlap_its_seconds(tmp_path, name):
    made = make_dump(tmp_path, [*"abcdefghijk"], format=name, layers=(17, 24))
    dump = open_dump(tmp_path, layer=17)
    whole = numpy_of(made.arrays["k"][17])
    assert len(whole) == 30

    for start, end, expected in [
        (0.0, None, range(30)),
        (0.1, 0.2, range(5, 10)),
        # Frame 5 covers 0.10 to 0.12.
        (0.11, 0.19, range(5, 10)),
        (0.119, 0.121, range(5, 7)),
        (0.58, 9.0, range(29, 30)),
        (0.14, 0.16, range(7, 8)),
    ]:
        found = dump.slice("k", start, end)
        assert np.array_equal(found, whole[list(expected)]), (start, end)
    found = dump.slice("k", start=0.1, end=0.2, layer=24)
    assert np.array_equal(found, numpy_of(made.arrays["k"][24])[5:10])


@pytest.mark.parametrize(
    ("start", "end"), [(0.3, 0.3), (0.3, 0.2), (-0.1, 1), (0.4, 9)]
)
def test_a_slice_without_a_frame_is_refused(tmp_path, start, end):
    make_dump(tmp_path)

    with pytest.raises(ArgumentError, match=r"c: has no frame .* span 0\.40 s"):
        open_dump(tmp_path).slice("c", start, end)


def test_a_pooled_dump_has_no_slices(tmp_path):
    make_dump(tmp_path, pool="mean")

    with pytest.raises(ArgumentError, match="pooled"):
        open_dump(tmp_path).slice("c", 0, 0.1)


# -- several dumps together ----------------------------------------------------------


def make_jobs(location: Path, present=(0, 1, 2), total: int = 3, **options) -> dict:
    arrays = {}
    for n in present:
        share = {"index": n, "num": total, "from": f"{n:016x}", "to": f"{n + 1:016x}"}
        made = make_dump(
            location / f"part-{n:05d}-of-{total:05d}",
            [f"{n}-a", f"{n}-b", f"{n}-c"],
            share=share,
            seed=n,
            **options,
        )
        arrays |= made.arrays
    return arrays


def test_the_jobs_of_an_array_are_read_together(tmp_path):
    arrays = make_jobs(tmp_path)
    (tmp_path / "plan.json").write_text("{}")

    dump = open_dump(tmp_path)

    assert dump.complete
    assert list(dump) == [f"{n}-{x}" for n in range(3) for x in "abc"]
    for id, array in dump.items():
        assert_same(array, arrays[id][17])
    assert len(dump.index) == 9
    assert [store.location for store in dump_stores(tmp_path)] == [
        str(tmp_path / f"part-{n:05d}-of-00003") for n in range(3)
    ]


def test_a_list_of_dumps_is_read_together(tmp_path):
    one = make_dump(tmp_path / "one", ["a", "b", "bad"])
    arrays = make_jobs(tmp_path / "jobs")

    dump = open_dump([tmp_path / "one", str(tmp_path / "jobs")])

    assert dump.ids[:3] == ("a", "b", "0-a")
    assert_same(dump["b"], one.arrays["b"][17])
    assert_same(dump["2-c"], arrays["2-c"][17])
    assert dump.failures.keys() == {"bad"}
    with pytest.raises(DumpError, match="list is empty"):
        open_dump([])


def test_dumps_of_other_settings_are_not_read_together(tmp_path):
    make_dump(tmp_path / "one", ["a"])
    make_dump(tmp_path / "two", ["b"], dtype="float16")

    with pytest.raises(DumpError, match=r"two: .*dtype is float16 .* float32"):
        open_dump([tmp_path / "one", tmp_path / "two"])


def test_an_id_that_two_dumps_have_is_refused(tmp_path):
    make_dump(tmp_path / "one", ["a", "b"])
    make_dump(tmp_path / "two", ["c", "b"])

    with pytest.raises(DumpError, match="'b' occurs more than once"):
        open_dump([tmp_path / "one", tmp_path / "two"])


# -- incomplete ----------------------------------------------------------------------


def test_a_dump_that_is_not_complete_is_opened_with_a_warning(tmp_path):
    make_dump(tmp_path, complete=False)

    with pytest.warns(
        UserWarning, match=f"{tmp_path}: .*not complete.*to go on"
    ) as got:
        dump = open_dump(tmp_path)

    assert not dump.complete
    assert len(dump) == 5
    assert got[0].filename == __file__


def test_missing_and_unfinished_jobs_are_counted_in_the_warning(tmp_path):
    make_jobs(tmp_path, present=[0, 2], total=4)
    info = tmp_path / "part-00002-of-00004/dump.json"
    info.write_text(info.read_text().replace('"complete": true', '"complete": false'))
    (tmp_path / "part-00003-of-00004").mkdir()  # its job has not begun

    with pytest.warns(UserWarning, match="of 4 jobs 2 have begun and 1 are finished"):
        dump = open_dump(tmp_path)

    assert not dump.complete
    assert len(dump) == 6


def test_a_job_of_an_array_can_be_opened_alone(tmp_path):
    make_jobs(tmp_path, present=[1])

    assert open_dump(tmp_path / "part-00001-of-00003").complete


def test_jobs_of_two_arrays_in_one_folder_are_refused(tmp_path):
    make_jobs(tmp_path, present=[0], total=2)
    make_jobs(tmp_path, present=[1], total=3)

    with pytest.raises(DumpError, match="several arrays, of 2 and 3 jobs"):
        open_dump(tmp_path)


# -- errors --------------------------------------------------------------------------


def test_a_folder_without_a_dump_is_refused_with_what_makes_one(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DumpError, match=f"{path}: there is no dump.*w2vbert dump"):
            open_dump(path)


def test_a_dump_of_a_newer_version_is_refused(tmp_path):
    make_dump(tmp_path)
    info = json.loads((tmp_path / "dump.json").read_text())
    (tmp_path / "dump.json").write_text(json.dumps(info | {"version": 2}))

    with pytest.raises(DumpError, match=r"dump\.json: .*version 2.*newer"):
        open_dump(tmp_path)


def test_a_damaged_index_is_refused_with_its_name(tmp_path):
    make_dump(tmp_path)
    part = tmp_path / "index/part-000000000002.parquet"
    part.write_bytes(part.read_bytes()[:-40])

    with pytest.raises(DumpError, match=f"{part}"):
        open_dump(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_shard_is_an_error_when_it_is_read_and_not_before(tmp_path, name):
    make_dump(tmp_path, format=name)
    (shard,) = tmp_path.glob("data/shard-000000000002-*")
    shard.rename(tmp_path / "elsewhere")

    dump = open_dump(tmp_path)

    dump["c"]
    with pytest.raises(DumpError, match=f"{shard}.*is not there.*verify"):
        dump["b"]


def test_what_is_read_is_what_the_index_says_or_an_error(tmp_path):
    make_dump(tmp_path)
    shards = sorted(tmp_path.glob("data/*"))
    content = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(content[1])

    with pytest.raises(DumpError, match=f"{shards[0]}.*verify"):
        open_dump(tmp_path)["c"]


# -- normalised ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pool", [None, "mean"])
def test_normalised_arrays_have_the_corpus_mean_removed_per_dimension(
    tmp_path, pool, dtype
):
    made = make_dump(
        tmp_path, layers=(17, 24), pool=pool, dtype=dtype, format="safetensors"
    )
    moments = write_statistics(tmp_path, (17, 24))

    dump = open_dump(tmp_path, 24, normalize=True)

    for layer, view in [(24, dump), (17, dump.layer(17))]:
        mean, var = moments[f"mean_{layer}"], moments[f"var_{layer}"]
        for id, array in view.items():
            stored = made.arrays[id][layer].double().numpy()
            assert array.dtype == np.float32
            np.testing.assert_allclose(
                array, (stored - mean) / np.sqrt(var), rtol=1e-5, atol=1e-5
            )
        for found, expected in zip(view.statistics(), (mean, var), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_statistics_of_another_corpus_can_be_used(tmp_path):
    made = make_dump(tmp_path / "test", ["u"])
    make_dump(tmp_path / "train", ["v"])
    moments = write_statistics(tmp_path / "train")
    expected = numpy_of(made.arrays["u"][17]) - moments["mean_17"]
    expected /= np.sqrt(moments["var_17"])

    for path in (tmp_path / "train", str(tmp_path / "train/statistics.npz")):
        found = open_dump(tmp_path / "test", normalize=path)["u"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_dumps_read_together_are_those_of_all_their_frames(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.standard_normal((n, DIM)) * n + n for n in (5, 40, 7)]
    make_jobs(tmp_path)
    for n, values in enumerate(frames):
        write_statistics(
            tmp_path / f"part-{n:05d}-of-00003",
            frames=len(values),
            mean_17=values.mean(axis=0),
            var_17=values.var(axis=0),
        )

    mean, var = open_dump(tmp_path).statistics()

    together = np.concatenate(frames)
    np.testing.assert_allclose(mean, together.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(var, together.var(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"pool": "max"}, "pooled by max"),
        ({"pool": "mean+std"}, r"pooled by mean\+std"),
        ({"normalize": "1" * 64}, "already normalised"),
        ({}, r"statistics\.npz: is not there.*complete"),
    ],
)
def test_what_cannot_be_normalised_is_refused_at_once(tmp_path, changed, says):
    make_dump(tmp_path, **changed)
    if changed:
        write_statistics(tmp_path)

    with pytest.raises(DumpError, match=says):
        open_dump(tmp_path, normalize=True)


def test_statistics_that_are_damaged_or_have_no_spread_are_refused(tmp_path):
    make_dump(tmp_path)
    write_statistics(tmp_path, var_17=np.zeros(DIM))
    with pytest.raises(DumpError, match="variance of layer 17 is 0"):
        open_dump(tmp_path, normalize=True)

    for content in (b"", b"PK\x03\x04nothing", b"nothing"):
        (tmp_path / "statistics.npz").write_bytes(content)
        with pytest.raises(DumpError, match=r"statistics\.npz: is damaged"):
            open_dump(tmp_path, normalize=True)


# -- resources -----------------------------------------------------------------------


def test_a_bounded_number_of_shards_is_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_OPEN", 3)
    ids = [f"u{n}" for n in range(20)]
    made = make_dump(tmp_path, ids, per_shard=1, format="fairseq", dim=1024)
    dump = open_dump(tmp_path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(2):
        for id in ids:
            assert_same(dump[id], made.arrays[id][17])
            assert len(os.listdir("/proc/self/fd")) - before <= 3 + 1


def test_opening_a_dump_opens_no_shard_and_makes_no_object_per_utterance(
    tmp_path, monkeypatch
):
    make_dump(tmp_path, [f"u{n}" for n in range(300)], per_shard=100)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    open_dump(tmp_path)
    gc.collect()
    before = len(gc.get_objects())

    dump = open_dump(tmp_path)

    assert len(dump) == 300
    assert len(gc.get_objects()) - before < 200


# -- behind a URL --------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_dump_behind_a_url_is_read_through_few_local_copies(
    tmp_path, monkeypatch, name
):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(reader, "_MAX_COPIES", 1)
    url = f"memory://reader-{name}"
    made = make_dump(url, format=name, layers=(17, 24))

    dump = open_dump(url, layer=24)

    for _ in range(2):
        for id, array in dump.items():
            assert_same(array, made.arrays[id][24])
    copies = list(tmp_path.glob("seamless_w2vbert-*/data/*"))
    assert len(copies) == 1


# -- as training data ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_torch_dataset_has_tensors_of_the_stored_dtype_and_columns(tmp_path, dtype):
    made = make_dump(tmp_path, layers=(17, 24), dtype=dtype, format="safetensors")
    dump = open_dump(tmp_path)

    dataset = dump.torch_dataset(layer=24, columns=["text", "frames"])

    assert len(dataset) == 5
    item = dataset[2]
    assert item.keys() == {"id", "embedding", "text", "frames"}
    assert (item["id"], item["text"], item["frames"]) == ("b", "said b", 22)
    assert item["embedding"].dtype == getattr(torch, dtype)
    assert torch.equal(item["embedding"], made.arrays["b"][24])
    item["embedding"].zero_()
    assert torch.equal(dataset[2]["embedding"], made.arrays["b"][24])
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(ArgumentError, match="no column 'words'; it has id, source"):
        dump.torch_dataset(layer=24, columns=["words"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_torch_dataset_works_in_dataloader_workers(tmp_path, name):
    made = make_dump(tmp_path, format=name)
    dump = open_dump(tmp_path)
    dump["c"]  # a shard is open when the workers start

    loader = DataLoader(
        dump.torch_dataset(columns=["speaker"]),
        batch_size=None,
        num_workers=2,
        shuffle=True,
    )
    items = list(loader)

    assert sorted(item["id"] for item in items) == sorted(made.arrays)
    for item in items:
        assert torch.equal(item["embedding"], made.arrays[item["id"]][17])


def test_a_dump_and_its_dataset_can_be_sent_to_another_process(tmp_path):
    made = make_dump(tmp_path)
    write_statistics(tmp_path)
    dump = open_dump(tmp_path, normalize=True)
    expected = dump["a/ü"]

    for copied in (pickle.loads(pickle.dumps(dump)), copy.deepcopy(dump)):
        assert np.array_equal(copied["a/ü"], expected)
        assert list(copied) == list(made.arrays)
    dataset = pickle.loads(pickle.dumps(dump.torch_dataset()))
    assert np.array_equal(dataset[1]["embedding"].numpy(), expected)


def test_the_index_on_disk_is_plain_parquet(tmp_path):
    make_dump(tmp_path)

    files = sorted((tmp_path / "index").iterdir())
    tables = [pq.read_table(io.BytesIO(file.read_bytes())) for file in files]

    assert pa.concat_tables(
        table.replace_schema_metadata(None) for table in tables
    ).equals(open_dump(tmp_path).index)
