from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from command import peak_of_loading
from reference import (
    SPEECH,
    hidden_states_from_audio,
    read_mono_16k,
    relative_difference,
    transformers_config,
    write_fairseq,
    write_fairseq2,
)
from transformers import Wav2Vec2BertModel

from seamless_w2vbert import (
    ArgumentError,
    SpeechEncoderPipeline,
    UntrainedModelWarning,
    load_conformer_shaw_model,
    stack,
)
from seamless_w2vbert.architecture import Architecture

needs_0_8 = pytest.mark.skipif(
    stack.fairseq2_generation() != "0.8", reason="needs fairseq2 0.8"
)
needs_seamless = pytest.mark.skipif(
    getattr(stack.load(), "seamless_conformer_shaw", None) is None,
    reason="needs seamless_communication, which no package registry has",
)


def test_tiny_random_warns_that_it_is_untrained():
    with pytest.warns(UntrainedModelWarning, match="tiny-random is untrained"):
        load_conformer_shaw_model("tiny-random")


def test_tiny_random_has_the_true_block_structure(tiny):
    (block, *_), count = tiny.module.encoder.layers, tiny.num_layers
    state = block.state_dict()

    assert 2 <= count <= 4
    assert state["self_attn.sdpa.rel_k_embed.weight"].size(0) == 64 + 1 + 8
    assert state["conv.depthwise_conv.weight"].size(2) == 31
    assert state["ffn1.inner_proj.weight"].shape == (512, 128)
    assert "conv.layer_norm.weight" in state


def test_tiny_random_is_the_same_each_time(tiny):
    again = load_conformer_shaw_model("tiny-random").state_dict()
    for name, tensor in tiny.module.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_an_integer_dtype_is_refused():
    with pytest.raises(ArgumentError, match=r"torch\.int8"):
        load_conformer_shaw_model("tiny-random", dtype=torch.int8)


# -- fairseq2's own registries -------------------------------------------------------


@pytest.fixture
def card(tmp_path, small_model, monkeypatch):
    """A card in the user's asset folder, where fairseq2 looks for cards."""
    write_fairseq2(small_model, tmp_path / "small.pt")
    old = stack.fairseq2_generation() == "0.2"
    family = "model_type: wav2vec2" if old else "model_family: conformer_shaw"
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "small.yaml").write_text(
        f"""\
name: my_small_encoder
{family}
model_arch: {"conformer_shaw_600m" if old else "600m"}
checkpoint: "file://{tmp_path}/small.pt"
model_config:
  _set_:
    final_dim: 24
    quantized_dim: 32
    num_codebook_entries: 5
  encoder_config:
    _set_:
      model_dim: 48
      num_encoder_layers: 2
      num_encoder_attn_heads: 3
      ffn_inner_dim: 96
"""
    )
    return {**os.environ, "FAIRSEQ2_USER_ASSET_DIR": str(tmp_path / "cards")}


def run(program: str, environment) -> str:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout.strip()


def test_a_users_card_is_loaded_by_name(card, small_model):
    program = """
from seamless_w2vbert import load_conformer_shaw_model
model = load_conformer_shaw_model("my_small_encoder")
print(type(model).__name__, float(sum(p.double().sum() for p in model.parameters())))
"""
    name, total = run(program, card).split()[-2:]
    expected = sum(p.double().sum() for p in small_model.parameters())
    assert name == "Wav2Vec2Model"
    assert float(total) == pytest.approx(float(expected), rel=1e-9)


@needs_0_8
@pytest.mark.parametrize("write", [write_fairseq, write_fairseq2])
def test_fairseq2s_own_hub_loads_the_family_by_name(
    card, tmp_path, small_model, write, clips
):
    write(small_model, tmp_path / "small.pt")
    torch.save(clips, tmp_path / "clips.pt")
    program = f"""
import torch
from fairseq2.assets import get_asset_store
from fairseq2.models import load_model
assert get_asset_store().retrieve_card("conformer_shaw").name == "conformer_shaw"
model = load_model("my_small_encoder", device=torch.device("cpu"), dtype=torch.float32)
from seamless_w2vbert import SpeechEncoderPipeline
clips = torch.load({str(tmp_path / "clips.pt")!r}, weights_only=False)
output = SpeechEncoderPipeline(model)(clips)
torch.save(output.last_hidden_state.clone(), {str(tmp_path / "out.pt")!r})
"""
    run(program, card)
    actual = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = SpeechEncoderPipeline(small_model)(clips).last_hidden_state
    torch.testing.assert_close(actual, expected)


@needs_0_8
def test_the_family_offers_its_architectures_and_card():
    from seamless_w2vbert.stack.current import get_conformer_shaw_model_hub

    hub = get_conformer_shaw_model_hub()
    assert hub.get_archs() == {"600m", "tiny"}

    config = hub.get_model_config("conformer_shaw")
    assert config.encoder_config.num_encoder_layers == 24
    assert config.encoder_config.max_right_rel_pos == 8
    assert (config.final_dim, config.quantized_dim) == (768, 768)

    model = hub.create_new_model(hub.get_arch_config("tiny"), meta=True)
    assert len(model.encoder.layers) == 3


# -- seamless_communication ----------------------------------------------------------


@needs_seamless
def test_seamless_builder_makes_the_models(small_model):
    module = type(small_model.encoder.layers[0].self_attn.sdpa).__module__
    builder = stack.load()._encoder_builder(Architecture())
    assert type(builder).__module__.startswith("seamless_communication")
    assert module == "fairseq2.nn.transformer.shaw_attention"


@needs_seamless
def test_seamless_own_loader_gives_the_same_embeddings(small_model, tmp_path, clips):
    """Its ModelLoader, its converter, its card; our pipeline around both."""
    import dataclasses

    from fairseq2.assets import AssetCard
    from fairseq2.models.wav2vec2.builder import wav2vec2_archs
    from seamless_communication.models.conformer_shaw import (
        load_conformer_shaw_model as seamless_loader,
    )

    write_fairseq(small_model, tmp_path / "small.pt")
    config = wav2vec2_archs.get_config("conformer_shaw_600m")
    config = dataclasses.replace(
        config,
        encoder_config=dataclasses.replace(
            config.encoder_config,
            model_dim=48,
            num_encoder_layers=2,
            num_encoder_attn_heads=3,
            ffn_inner_dim=96,
        ),
        final_dim=24,
        quantized_dim=32,
        num_codebook_entries=5,
    )
    card = AssetCard(
        {
            "name": "small",
            "model_type": "wav2vec2",
            "model_arch": "conformer_shaw_600m",
            "model_config": config,
            "checkpoint": (tmp_path / "small.pt").as_uri(),
        }
    )
    theirs = SpeechEncoderPipeline(seamless_loader(card).eval())
    ours = SpeechEncoderPipeline.from_pretrained(tmp_path / "small.pt")

    for layer in range(3):
        assert torch.equal(
            ours(clips, layers=layer).hidden_states[layer],
            theirs(clips, layers=layer).hidden_states[layer],
        )


# -- full size -----------------------------------------------------------------------


@pytest.mark.full_size
def test_at_full_size_every_layer_is_that_of_transformers(tmp_path):
    """The 600M architecture with random weights, from an audio file: written by
    Transformers, read by us, all 24 layers compared, memory measured."""
    torch.manual_seed(0)
    twin = Wav2Vec2BertModel(transformers_config(Architecture())).eval()
    twin.save_pretrained(tmp_path / "full", safe_serialization=True)
    weights = sum(p.numel() * p.element_size() for p in twin.parameters())

    samples = read_mono_16k(SPEECH)[:48000]
    expected = hidden_states_from_audio(twin, [samples])
    del twin

    loaded, ran = peak_of_loading(tmp_path / "full")
    assert weights > 2.3e9
    assert loaded * 2**20 < 0.2 * weights
    assert ran * 2**20 < 1.2 * weights

    pipeline = SpeechEncoderPipeline.from_pretrained(tmp_path / "full")
    output = pipeline([torch.from_numpy(samples)], layers=range(25))

    assert pipeline.num_layers == 24
    differences = [
        relative_difference(output.hidden_states[layer][0], expected[layer][0])
        for layer in range(25)
    ]
    assert max(differences) < 1e-4, differences
