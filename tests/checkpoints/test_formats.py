from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from command import peak_of_loading
from reference import (
    TO_FAIRSEQ,
    TO_TRANSFORMERS,
    edit_config,
    rename,
    transformers_config,
    write_fairseq,
    write_fairseq2,
    write_transformers,
)
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2BertForSequenceClassification

from seamless_w2vbert import (
    ArgumentError,
    CheckpointError,
    SpeechEncoderPipeline,
    load_conformer_shaw_model,
)
from seamless_w2vbert.checkpoints import names, read_checkpoint


def encoder_state(model) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("encoder_frontend.", "encoder."))
    }


def assert_same_encoder(actual, expected) -> None:
    actual, expected = encoder_state(actual), encoder_state(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.fixture
def fairseq_file(small_model, tmp_path):
    path = tmp_path / "conformer_shaw.pt"
    write_fairseq(small_model, path)
    return path


@pytest.fixture
def folder(small_model, small_architecture, tmp_path):
    path = tmp_path / "transformers"
    write_transformers(small_model, small_architecture, path)
    return path


def test_a_fairseq_file_loads_with_its_pretraining_heads(small_model, fairseq_file):
    model = load_conformer_shaw_model(fairseq_file)

    assert type(model).__name__ == "Wav2Vec2Model"
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_fairseq2_file_loads_with_its_pretraining_heads(small_model, tmp_path):
    write_fairseq2(small_model, tmp_path / "fs2.pt")
    model = load_conformer_shaw_model(tmp_path / "fs2.pt")

    assert type(model).__name__ == "Wav2Vec2Model"
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_bare_state_dict_of_an_encoder_loads(small_model, tmp_path):
    torch.save(encoder_state(small_model), tmp_path / "encoder.pt")
    assert_same_encoder(load_conformer_shaw_model(tmp_path / "encoder.pt"), small_model)

    save_file(encoder_state(small_model), tmp_path / "encoder.safetensors")
    model = load_conformer_shaw_model(str(tmp_path / "encoder.safetensors"))
    assert_same_encoder(model, small_model)


def test_a_transformers_folder_loads(small_model, folder):
    model = load_conformer_shaw_model(folder)
    assert_same_encoder(model, small_model)
    assert_same_encoder(load_conformer_shaw_model(folder / "model.safetensors"), model)


def test_a_sharded_transformers_folder_loads(small_model, small_architecture, tmp_path):
    write_transformers(small_model, small_architecture, tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_encoder(load_conformer_shaw_model(tmp_path), small_model)


def test_the_encoder_of_a_task_head_loads_and_the_head_is_named(
    small_architecture, tmp_path
):
    torch.manual_seed(0)
    config = transformers_config(small_architecture, num_labels=3)
    classifier = Wav2Vec2BertForSequenceClassification(config)
    classifier.save_pretrained(tmp_path)

    with pytest.warns(UserWarning, match="classifier, projector are no part"):
        model = load_conformer_shaw_model(tmp_path)

    state = classifier.wav2vec2_bert.state_dict()
    for name, tensor in encoder_state(model).items():
        assert torch.equal(tensor, state[rename(name, TO_TRANSFORMERS)])


@pytest.mark.parametrize("table", [TO_FAIRSEQ, TO_TRANSFORMERS])
def test_names_survive_the_round_trip(small_model, table):
    format_ = "fairseq" if table is TO_FAIRSEQ else "transformers"
    for name in encoder_state(small_model):
        assert names.fairseq2_name(rename(name, table), format_) == name


def test_the_loaded_dtype_is_the_one_asked_for(folder, fairseq_file):
    for path in (folder, fairseq_file):
        model = load_conformer_shaw_model(path, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not model.training


def test_a_loaded_model_is_nowhere_on_the_meta_device(folder, fairseq_file):
    for path in (folder, fairseq_file):
        model = load_conformer_shaw_model(path)
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_writing_to_a_loaded_model_does_not_write_to_its_file(fairseq_file, folder):
    for path in (fairseq_file, folder):
        before = load_conformer_shaw_model(path)
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.zero_()
        after = load_conformer_shaw_model(path)
        assert any(bool((parameter != 0).any()) for parameter in after.parameters())


# -- refused -------------------------------------------------------------------------


def edit(path, change) -> None:
    """Apply ``change`` to the state dict of a file, whatever its format."""
    if path.suffix == ".safetensors":
        state = load_file(path)
        change(state)
        save_file(state, path)
    else:
        content = torch.load(path, weights_only=True)
        change(content["model"])
        torch.save(content, path)


def weights_of(path):
    return path / "model.safetensors" if path.is_dir() else path


@pytest.fixture(params=["fairseq_file", "folder"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


def name_ending(state, ending: str) -> str:
    return next(name for name in state if name.endswith(ending))


@pytest.mark.parametrize(
    ("ending", "fairseq2_name"),
    [
        ("encoder.layers.1.conv_module.pointwise_conv1.weight", "conv.pointwise_conv1"),
        ("encoder.layers.0.self_attn_layer_norm.bias", "self_attn_layer_norm.bias"),
        ("encoder.layers.1.final_layer_norm.weight", "layers.1.layer_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(checkpoint, ending, fairseq2_name):
    edit(weights_of(checkpoint), lambda s: s.pop(name_ending(s, ending)))
    pattern = rf"{checkpoint.name}.*{fairseq2_name}.* is missing"
    with pytest.raises(CheckpointError, match=pattern):
        load_conformer_shaw_model(checkpoint)


def test_a_missing_layer_is_named(checkpoint):
    def drop_first_layer(state):
        for name in [n for n in state if "encoder.layers.0." in n]:
            del state[name]

    edit(weights_of(checkpoint), drop_first_layer)
    with pytest.raises(CheckpointError, match=r"layers\.0\..* is missing"):
        load_conformer_shaw_model(checkpoint)


def test_an_unexpected_tensor_of_the_encoder_is_named(checkpoint):
    edit(
        weights_of(checkpoint),
        lambda s: s.update({"encoder.layers.0.ffn3.weight": torch.zeros(2)}),
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn3\.weight is unexpected"):
        load_conformer_shaw_model(checkpoint)


@pytest.mark.parametrize(
    ("ending", "shape"),
    [
        ("layers.1.self_attn_layer_norm.weight", (47,)),
        ("layers.1.conv_module.depthwise_conv.weight", (48, 1, 15)),
        ("layers.0.conv_module.pointwise_conv2.weight", (48, 48)),
        ("layers.0.conv_module.depthwise_conv.weight", (48, 1, 0)),
    ],
)
def test_a_tensor_of_another_shape_is_named(checkpoint, ending, shape):
    edit(
        weights_of(checkpoint),
        lambda s: s.update({name_ending(s, ending): torch.zeros(shape)}),
    )
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.\d\S* is of shape"):
        load_conformer_shaw_model(checkpoint)


def test_an_integer_tensor_in_place_of_weights_is_named(checkpoint):
    def to_integers(state):
        name = name_ending(state, "layers.0.final_layer_norm.weight")
        state[name] = state[name].to(torch.int64)

    edit(weights_of(checkpoint), to_integers)
    with pytest.raises(CheckpointError, match=r"layer_norm\.weight is of dtype"):
        load_conformer_shaw_model(checkpoint)


def test_another_table_of_positions_without_a_config_is_refused(fairseq_file):
    def widen(state):
        for name in [n for n in state if "rel_k_embedding" in n]:
            state[name] = torch.zeros(129, 16)

    edit(fairseq_file, widen)
    with pytest.raises(CheckpointError, match="129 relative positions"):
        load_conformer_shaw_model(fairseq_file)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("position_embeddings_type", "rotary"),
        ("position_embeddings_type", "relative"),
        ("position_embeddings_type", None),
        ("hidden_act", "gelu"),
        ("layer_norm_eps", 1e-6),
    ],
)
def test_a_config_of_another_scheme_is_refused_by_name(folder, setting, value):
    edit_config(folder, **{setting: value})
    with pytest.raises(CheckpointError, match=f"config.json sets {setting} to"):
        load_conformer_shaw_model(folder)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(checkpoint, fraction):
    file = weights_of(checkpoint)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=file.name):
        load_conformer_shaw_model(checkpoint)


class Exploit:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_is_refused_and_not_run(small_model, tmp_path, layout):
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"model": {**small_model.state_dict(), "x": Exploit(target)}}
    if layout == "plain":
        path.write_bytes(pickle.dumps({"model": {"x": Exploit(target)}}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")

    with pytest.raises(CheckpointError, match=r"evil\.pt: .*"):
        load_conformer_shaw_model(path)
    assert not target.exists()


def test_a_file_of_before_torch_1_6_loads(small_model, tmp_path):
    path = tmp_path / "old.pt"
    state = {"model": small_model.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_same_encoder(load_conformer_shaw_model(path), small_model)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 7])
def test_a_shard_index_may_not_leave_its_folder(
    small_model, small_architecture, tmp_path, name
):
    folder = tmp_path / "sharded"
    write_transformers(small_model, small_architecture, folder, shard="100KB")
    shutil.copy(next(folder.glob("model-*")), tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = name
    index.write_text(json.dumps(content))

    with pytest.raises(CheckpointError, match="not a file of this folder"):
        load_conformer_shaw_model(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pt", b"", "cannot be read|refused"),
        ("a.pt", b"nothing of the kind", "cannot be read|refused"),
        ("a.safetensors", b"nothing of the kind", "safetensors"),
        ("a.safetensors", b"\xff" * 8 + b"{}", "safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*({reason})"):
        load_conformer_shaw_model(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"not a W2v-BERT 2\.0 checkpoint"):
        load_conformer_shaw_model(tmp_path / "other.pt")

    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_conformer_shaw_model(tmp_path / "list.pt")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors"):
        load_conformer_shaw_model(tmp_path)


def test_transformers_weights_without_a_config_are_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_conformer_shaw_model(folder)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_conformer_shaw_model(folder)


def test_a_name_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no_such_model: is neither a file"):
        load_conformer_shaw_model("no_such_model")
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_conformer_shaw_model(tmp_path / "gone.pt")


# -- the published checkpoint --------------------------------------------------------


def put_into_cache(cache, file) -> None:
    """Lay a Hugging Face cache as hf_hub_download does."""
    commit = "0" * 40
    repo = cache / "models--facebook--w2v-bert-2.0"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(file, snapshot / "conformer_shaw.pt")


def load_published(cache) -> subprocess.CompletedProcess[str]:
    program = (
        "from seamless_w2vbert import *\n"
        "try:\n"
        "    print(type(load_conformer_shaw_model('conformer_shaw')).__name__)\n"
        "except CheckpointError as ex:\n"
        "    print('CheckpointError:', ex)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )


def test_the_published_card_is_taken_from_the_cache(fairseq_file, tmp_path):
    put_into_cache(tmp_path / "cache", fairseq_file)
    assert load_published(tmp_path / "cache").stdout.strip() == "Wav2Vec2Model"


def test_offline_the_error_says_what_to_fetch(tmp_path):
    message = load_published(tmp_path / "empty").stdout
    assert "hf download facebook/w2v-bert-2.0 conformer_shaw.pt" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert str(tmp_path / "empty") in message


# -- memory --------------------------------------------------------------------------


def test_a_pickled_checkpoint_costs_its_weights_once(tmp_path):
    """A wide model of few layers, in fairseq's format: 200 MB of weights."""
    from seamless_w2vbert import stack
    from seamless_w2vbert.architecture import Architecture, PretrainingHeads

    model = stack.load().build_model(
        Architecture(num_layers=2, pretraining=PretrainingHeads())
    )
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    write_fairseq(model, tmp_path / "wide.pt")
    del model
    weights = (tmp_path / "wide.pt").stat().st_size / 2**20

    loaded, run = peak_of_loading(tmp_path / "wide.pt")

    assert weights > 180
    assert loaded < 0.2 * weights  # mapped, not read
    assert run < 1.2 * weights


def test_an_opened_checkpoint_says_what_it_is(fairseq_file, folder, small_architecture):
    opened = read_checkpoint(fairseq_file)
    assert (opened.format, opened.architecture) == ("fairseq", small_architecture)

    opened = read_checkpoint(folder)
    assert opened.format == "transformers"
    assert opened.config["model_type"] == "wav2vec2-bert"
    assert opened.architecture.num_heads == 3
    assert opened.architecture.pretraining is None


def test_every_format_gives_the_same_embedding(
    small_model, fairseq_file, folder, clips
):
    expected = SpeechEncoderPipeline(small_model)(clips).last_hidden_state
    for path in (fairseq_file, folder):
        pipeline = SpeechEncoderPipeline.from_pretrained(path, accelerated=False)
        assert torch.equal(pipeline(clips).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_hidden_layers", 1),
        ("num_attention_heads", 4),
        ("conv_depthwise_kernel_size", 3),
        ("hidden_size", "48"),
        ("left_max_position_embeddings", "64"),
        ("right_max_position_embeddings", -1),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(folder, setting, value):
    edit_config(folder, **{setting: value})
    with pytest.raises(CheckpointError, match=f"config.json sets {setting} to"):
        load_conformer_shaw_model(folder)


def test_json_without_bottom_is_refused(folder):
    (folder / "config.json").write_text('{"a":' + "[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        load_conformer_shaw_model(folder)


def test_a_compressed_archive_is_not_taken_for_weights(fairseq_file):
    with zipfile.ZipFile(fairseq_file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(fairseq_file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed archive"):
        load_conformer_shaw_model(fairseq_file)


@pytest.mark.parametrize(
    "data",
    [
        b".",
        b"\x80\x02\x85.",
        b"\x80\x02J1.",
        b"\x80\x02K\x05Q.",
        b"RIFF....WAVE",
        b"PK",
    ],
)
def test_bytes_of_any_kind_are_refused(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pt: "):
        load_conformer_shaw_model(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: torch.zeros(1, 1).expand(2**40, 2**20),
    ],
)
def test_tensors_that_are_no_plain_arrays_are_refused(fairseq_file, change):
    def replace(state):
        name = name_ending(state, "layers.0.ffn1.w_1.weight")
        state[name] = change(state[name])

    edit(fairseq_file, replace)
    with pytest.raises(CheckpointError, match=r"conformer_shaw\.pt: "):
        load_conformer_shaw_model(fairseq_file)


@pytest.mark.parametrize("device", ["meta", "no_such_device", "mps", None, -7])
def test_a_device_that_computes_nothing_is_refused(device):
    with pytest.raises(ArgumentError, match="cannot be used here"):
        load_conformer_shaw_model("tiny-random", device=device)


@pytest.mark.parametrize("dtype", ["float32", None, torch.int8, torch.complex64])
def test_a_dtype_that_nothing_is_computed_in_is_refused(dtype):
    with pytest.raises(ArgumentError, match="cannot be of dtype"):
        load_conformer_shaw_model("tiny-random", dtype=dtype)
