from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import soxr
import torch
from reference import (
    SPEECH,
    read_mono_16k,
    transformers_twin,
    write_fairseq,
    write_transformers,
)

from seamless_w2vbert import (
    ArgumentError,
    SpeechEncoderPipeline,
    Waveform,
    dump,
    open_dump,
    stack,
)
from seamless_w2vbert.architecture import Architecture
from seamless_w2vbert.batch import FbankBatch
from seamless_w2vbert.comparison import Tolerance, compare
from seamless_w2vbert.comparison.measure import (
    Meter,
    default_tolerances,
    set_tolerances,
)
from seamless_w2vbert.comparison.report import render

DEEP = Architecture(num_layers=12, model_dim=48, num_heads=3, ffn_inner_dim=96)


def build(seed: int = 3) -> torch.nn.Module:
    """A deep, narrow model; the same weights for the same seed."""
    model = stack.load().build_model(DEEP)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        + torch.randn(tensor.shape, generator=generator) / 6
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.fixture
def pipeline():
    return SpeechEncoderPipeline(build())


@pytest.fixture(scope="module")
def twin():
    return transformers_twin(build(), DEEP)


@pytest.fixture(scope="module")
def second_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "second.wav"
    soundfile.write(path, read_mono_16k(SPEECH)[9000:41234], 16000)
    return path


def test_two_correct_implementations_are_within_tolerance(pipeline, twin, second_file):
    comparison = compare([SPEECH, second_file], pipeline, twin)

    assert comparison.passed
    assert comparison.first is None
    assert comparison.sentence.startswith("Within tolerance at every stage")
    assert [stage.stage for stage in comparison.stages] == [
        "waveform",
        "fbank",
        "pad",
        "frontend",
        *[f"layer {n}" for n in range(1, 13)],
        "final",
    ]


# -- planted faults ------------------------------------------------------------------


def layer(pipeline, number):
    return pipeline.module.encoder.layers[number - 1]


def swap_resampler(pipeline):
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    resampled = soxr.resample(samples, rate, 16000, quality="LQ")
    original = pipeline.decode

    def decode(audio, **kwargs):
        if isinstance(audio, (str, type(SPEECH))):
            return Waveform(torch.from_numpy(resampled))
        return original(audio, **kwargs)

    pipeline.decode = decode


def switch_standardize_off(pipeline):
    converter = stack.load().WaveformToFbankConverter(
        num_mel_bins=80, waveform_scale=2**15, channel_last=True, standardize=False
    )
    pipeline.fbank = lambda waveform: converter(
        {"waveform": waveform.samples.unsqueeze(-1), "sample_rate": 16000}
    )["fbank"]


def take_the_biased_variance(pipeline):
    pipeline.insert_after("fbank", lambda f: f * (len(f) / (len(f) - 1)) ** 0.5)


def pad_with_zeros(pipeline):
    collater = stack.load().Collater(pad_value=0)

    def pad(fbanks):
        data = collater(list(fbanks))
        return FbankBatch(data["seqs"], torch.as_tensor(data["seq_lens"]))

    pipeline.pad = pad


@torch.no_grad()
def reverse_a_table_of_positions(pipeline):
    table = layer(pipeline, 5).self_attn.sdpa.rel_k_embed.weight
    table.copy_(table.flip(0))


@torch.no_grad()
def swap_q_and_k(pipeline):
    attention = layer(pipeline, 11).self_attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def change_an_epsilon(pipeline):
    pipeline.module.encoder_frontend.post_extract_layer_norm.eps = 1e-6


def change_an_epsilon_in_a_block(pipeline):
    layer(pipeline, 4).layer_norm.eps = 1e-6


@torch.no_grad()
def round_a_weight(pipeline):
    weight = layer(pipeline, 7).ffn1.inner_proj.weight
    weight.copy_(weight.bfloat16().float())


def shift_by_a_frame(pipeline):
    original = pipeline.encoder_frontend
    pipeline.encoder_frontend = lambda batch: original(
        FbankBatch(batch.seqs[:, 1:], batch.lengths - 1)
    )


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (swap_resampler, "waveform"),
        (switch_standardize_off, "fbank"),
        (take_the_biased_variance, "fbank"),
        (pad_with_zeros, "pad"),
        (change_an_epsilon, "frontend"),
        (shift_by_a_frame, "frontend"),
        (change_an_epsilon_in_a_block, "layer 4"),
        (reverse_a_table_of_positions, "layer 5"),
        (round_a_weight, "layer 7"),
        (swap_q_and_k, "layer 11"),
    ],
)
def test_a_planted_fault_is_found_at_its_stage(pipeline, twin, fault, stage):
    fault(pipeline)
    comparison = compare([SPEECH], pipeline, twin)

    assert not comparison.passed
    assert comparison.first.stage == stage
    assert f"leaves tolerance is {stage}:" in comparison.sentence
    # Every stage but the one at fault is innocent on the same input.
    guilty = [s.stage for s in comparison.stages if not s.same_passed]
    assert guilty == ([] if stage == "waveform" else [stage])


def test_the_worst_place_is_where_it_was_planted(pipeline, twin, second_file):
    def corrupt(fbank):
        if len(fbank) < 300:  # the second file
            fbank = fbank.clone()
            fbank[123, 45] += 1.0
        return fbank

    pipeline.insert_after("fbank", corrupt)
    comparison = compare([SPEECH, second_file], pipeline, twin)
    worst = comparison.first.own.worst

    assert comparison.first.stage == "fbank"
    assert (worst.file, worst.frame, worst.dimension) == (str(second_file), 123, 45)
    assert worst.seconds == pytest.approx(1.23)
    assert comparison.example.file == str(second_file)


# -- measures ------------------------------------------------------------------------


def test_measures_are_those_of_numpy():
    random = np.random.default_rng(0)
    pairs = [
        (a, a + 0.01 * random.standard_normal(a.shape))
        for a in (random.standard_normal((n, 6)) for n in (4, 9))
    ]
    meter = Meter(0.02)
    for number, (a, b) in enumerate(pairs):
        meter.add(torch.from_numpy(a), torch.from_numpy(b), f"file {number}")
    result = meter.result()

    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    row = int(np.abs(a - b).max(axis=1).argmax())

    assert result.max_abs == pytest.approx(np.abs(a - b).max())
    assert result.mean_abs == pytest.approx(np.abs(a - b).mean())
    assert result.max_relative == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert result.mean_relative == pytest.approx(
        np.abs(a - b).mean() / np.abs(a).mean()
    )
    assert result.cosine_mean == pytest.approx(cosine.mean())
    assert result.cosine_worst == pytest.approx(cosine.min())
    assert result.frames == 13
    assert result.worst.file == f"file {int(row >= 4)}"
    assert result.worst.frame == (row if row < 4 else row - 4)


def test_what_is_not_finite_is_never_within_tolerance():
    meter = Meter(0.02)
    meter.add(
        torch.ones(3, 2), torch.tensor([[1.0, 1], [1, float("nan")], [1, 1]]), "a"
    )
    assert not meter.result().within(Tolerance(1e9, 1e9))
    assert meter.result().worst.frame == 1
    assert json.loads(json.dumps(meter.result().to_json(), allow_nan=False))


def test_another_length_is_never_within_tolerance():
    meter = Meter(0.02)
    meter.add(torch.ones(3, 2), torch.ones(4, 2), "a.wav")
    assert not meter.result().within(Tolerance(1.0, 1.0))
    assert "a.wav: 3 frames of 2 on one side, 4" in meter.result().shape_mismatch


def test_tolerances_can_be_set():
    start = default_tolerances(torch.float32)
    changed = set_tolerances(start, ["layer=1e-3:1e-4", "fbank=0.5"])
    assert changed["layer", "same"] == Tolerance(1e-3, 1e-4)
    assert changed["fbank", "own"] == Tolerance(0.5, 0.5)
    assert changed["final", "own"] == start["final", "own"]
    assert set_tolerances(start, ["10"])["final", "own"].max == pytest.approx(
        10 * start["final", "own"].max
    )
    for bad in ("x", "mel=1", "layer=", "layer=1:2:3", "-1", "0", "=1"):
        with pytest.raises(ArgumentError, match="is neither a factor"):
            set_tolerances(start, [bad])


def test_a_wide_tolerance_lets_a_fault_pass(pipeline, twin):
    round_a_weight(pipeline)
    wide = set_tolerances(default_tolerances(torch.float32), ["layer=1", "final=1"])
    assert compare([SPEECH], pipeline, twin, tolerances=wide).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_its_own_tolerances(dtype):
    assert compare([SPEECH], "tiny-random", dtype=dtype).passed


# -- sides ---------------------------------------------------------------------------


def test_every_format_compares_with_transformers(
    small_model, small_architecture, tmp_path
):
    write_fairseq(small_model, tmp_path / "fairseq.pt")
    write_transformers(small_model, small_architecture, tmp_path / "folder")

    for model in (tmp_path / "fairseq.pt", tmp_path / "folder"):
        assert compare([SPEECH], model).passed

    across = compare(
        [SPEECH], tmp_path / "fairseq.pt", f"transformers:{tmp_path / 'folder'}"
    )
    assert across.passed
    assert across.against.endswith("folder")
    assert compare([SPEECH], tmp_path / "fairseq.pt", tmp_path / "folder").passed


def test_another_checkpoint_differs_from_the_frontend_on(pipeline):
    comparison = compare([SPEECH], pipeline, SpeechEncoderPipeline(build(seed=4)))
    assert comparison.first.stage == "frontend"
    assert not any(stage.passed for stage in comparison.stages[3:])


def test_another_depth_is_refused(pipeline, tiny):
    with pytest.raises(ArgumentError, match="12 layers and seamless_w2vbert 3"):
        compare([SPEECH], pipeline, tiny)


def test_a_dump_is_a_side(tiny, tmp_path):
    dump([SPEECH], tmp_path / "d", tiny, layers=(1, 3))

    for against in (str(tmp_path / "d"), open_dump(tmp_path / "d")):
        comparison = compare([SPEECH], tiny, against)
        assert comparison.passed
        assert [stage.stage for stage in comparison.stages] == ["layer 1", "layer 3"]

    other = SpeechEncoderPipeline.from_pretrained("tiny-random", dtype=torch.bfloat16)
    assert not compare([SPEECH], other, str(tmp_path / "d")).passed
    with pytest.raises(ArgumentError, match=r"has no absent\.wav"):
        compare(["absent.wav"], tiny, str(tmp_path / "d"))


def test_stored_embeddings_are_a_side(tiny, tmp_path):
    output = tiny(SPEECH, layers=(1, 3))
    arrays = {f"{SPEECH}#{n}": h[0].numpy() for n, h in output.hidden_states.items()}
    np.savez(tmp_path / "stored.npz", **arrays)

    comparison = compare([SPEECH], tiny, str(tmp_path / "stored.npz"))
    assert comparison.passed
    assert [stage.stage for stage in comparison.stages] == ["layer 1", "layer 3"]
    assert all(stage.same is None for stage in comparison.stages)

    arrays[f"{SPEECH}#3"] = arrays[f"{SPEECH}#3"] + 0.1
    comparison = compare([SPEECH], str(tmp_path / "stored.npz"), arrays)
    assert comparison.first.stage == "layer 3"
    assert comparison.sentence.startswith("The first stage that leaves tolerance is")


def test_a_folder_of_dumped_arrays_is_a_side(tiny, tmp_path):
    shutil.copy(SPEECH, tmp_path / "talk.flac")
    hidden = tiny(SPEECH).last_hidden_state[0].numpy()
    dump = tmp_path / "dump"
    dump.mkdir()
    np.save(dump / "talk.npy", hidden)

    comparison = compare([tmp_path / "talk.flac"], tiny, str(dump))
    assert comparison.passed
    assert [stage.stage for stage in comparison.stages] == ["final"]

    np.save(dump / "talk.npy", hidden[:-1])
    comparison = compare([tmp_path / "talk.flac"], tiny, str(dump))
    assert "277 frames of 128 on one side, 276" in comparison.sentence

    with pytest.raises(ArgumentError, match=r"has no .*speech\.flac"):
        compare([SPEECH], tiny, str(dump))
    with pytest.raises(ArgumentError, match="say what to compare them with"):
        compare([SPEECH], str(dump))


@pytest.mark.skipif(
    getattr(stack.load(), "seamless_conformer_shaw", None) is not None,
    reason="seamless_communication is importable here",
)
def test_seamless_communication_is_asked_for_by_name(pipeline):
    from seamless_w2vbert import StackError

    with pytest.raises(StackError, match="seamless_communication"):
        compare([SPEECH], pipeline, "seamless:conformer_shaw")


# -- output --------------------------------------------------------------------------


def test_json_holds_everything_but_the_pictures(pipeline, twin):
    swap_q_and_k(pipeline)
    comparison = compare([SPEECH], pipeline, twin)
    read = json.loads(json.dumps(comparison.to_json(), allow_nan=False))

    assert read["passed"] is False
    assert read["first"] == "layer 11"
    assert read["sentence"] == comparison.sentence
    assert read["versions"]["torch"] == torch.__version__.split("+")[0]
    stage = read["stages"][14]
    assert stage["stage"] == "layer 11"
    assert stage["same"]["max_relative"] > stage["same_tolerance"]["max"]
    assert stage["own"]["worst"]["file"] == str(SPEECH)


def test_the_page_needs_nothing_but_itself(pipeline, twin):
    page = render(compare([SPEECH], pipeline, twin))
    for address in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", page):
        assert address.startswith("data:")
    assert "<script" not in page


def test_the_page_shows_names_as_text(tiny, tmp_path):
    name = tmp_path / "<script>alert(1)</script>.flac".replace("/", "_")
    shutil.copy(SPEECH, name)
    page = render(compare([name], tiny))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

PROBE = """<script>
addEventListener("load", () => {
  const found = {
    images: [...document.images].map(i => [i.complete, i.naturalWidth,
      Math.round(i.getBoundingClientRect().width)]),
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    rows: document.querySelectorAll("tbody tr").length,
    differs: [...document.querySelectorAll("tr.differs td:first-child")]
      .map(cell => cell.textContent),
    verdict: document.querySelector(".verdict").textContent,
    requests: performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
  };
  document.title = "PROBE" + JSON.stringify(found) + "PROBE";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_looks_right_in_a_browser(pipeline, twin, tmp_path, width):
    """500 pixels is the narrowest window that headless Chromium opens."""
    swap_q_and_k(pipeline)
    comparison = compare([SPEECH], pipeline, twin)
    page = render(comparison)
    # The page forbids scripts; the copy that is looked at allows this one.
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, page)
    file = tmp_path / "report.html"
    file.write_text(page)

    result = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            f"--log-net-log={tmp_path / 'net.json'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(re.search(r"PROBE(\{.*\})PROBE", result.stdout)[1])

    assert found["width"] == width
    assert found["overflow"] <= 0
    assert found["requests"] == []
    assert len(found["images"]) == 3
    for complete, natural, shown in found["images"]:
        assert complete
        assert natural > 1000
        assert width / 2 < shown <= width
    assert found["rows"] == len(comparison.stages)
    assert found["differs"] == ["layer 11", "layer 12", "final"]
    assert found["verdict"] == comparison.sentence
