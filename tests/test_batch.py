from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seamless_w2vbert import AudioError
from seamless_w2vbert.batch import MAX_PADDING, cut_batches, pad, split_windows
from seamless_w2vbert.streaming import DEFAULT_MAX_FRAMES, window_of


def test_padding_is_ones_behind_the_true_lengths():
    fbanks = [torch.full((n, 80), float(n)) for n in (3, 7, 2)]
    batch = pad(fbanks)

    assert batch.seqs.shape == (3, 7, 80)
    assert batch.lengths.tolist() == [3, 7, 2]
    for row, fbank in enumerate(fbanks):
        assert torch.equal(batch.seqs[row, : len(fbank)], fbank)
        assert (batch.seqs[row, len(fbank) :] == 1).all()
        assert torch.equal(batch.unpadded()[row], fbank)


@pytest.mark.parametrize(
    ("fbanks", "reason"),
    [
        ([], "empty"),
        ([torch.zeros(5, 40)], r"\(5, 40\)"),
        ([torch.zeros(1, 80)], "fbank 0: has 1 fbank frames"),
        ([torch.zeros(4, 80), torch.zeros(80)], "fbank 1"),
    ],
)
def test_what_cannot_be_padded_is_refused(fbanks, reason):
    with pytest.raises(AudioError, match=reason):
        pad(fbanks)


lengths = st.lists(st.integers(min_value=0, max_value=5000), max_size=300)


@given(lengths=lengths, max_frames=st.integers(10, 9000), max_items=st.integers(1, 20))
def test_batches_hold_every_item_once_within_their_bounds(
    lengths, max_frames, max_items
):
    windows = split_windows(
        enumerate(lengths), window=4 * max_frames, max_items=max_items
    )
    seen = []

    for window in windows:
        batches = cut_batches(window, max_frames=max_frames, max_items=max_items)
        for batch in batches:
            width = max(lengths[index] for index in batch)
            assert 1 <= len(batch) <= max_items
            assert len(batch) == 1 or width * len(batch) <= max_frames
            if width * len(batch) > max_frames / 8 + width:
                filled = sum(lengths[index] for index in batch)
                assert filled >= (1 - MAX_PADDING) * width * len(batch)
        # Windows follow each other: order can be restored one window at a time.
        items = sorted(index for batch in batches for index in batch)
        assert items == list(range(len(seen), len(seen) + len(items)))
        seen += items

    assert seen == list(range(len(lengths)))


@pytest.mark.parametrize("device", list(DEFAULT_MAX_FRAMES))
@pytest.mark.parametrize("median", [4, 8])
@pytest.mark.parametrize("hours", [1, 10])
def test_little_of_a_mixed_corpus_is_padding(device, median, hours):
    random = np.random.default_rng(0)
    lengths = np.clip(
        random.lognormal(np.log(100 * median), 0.7, 1000 * hours), 100, 3000
    ).astype(int)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), hours * 360_000)]
    max_frames = DEFAULT_MAX_FRAMES[device]
    windows = split_windows(
        ((int(n), int(n)) for n in lengths),
        window=window_of(max_frames),
        max_items=64,
    )
    batches = [
        batch
        for window in windows
        for batch in cut_batches(window, max_frames=max_frames, max_items=64)
    ]
    computed = sum(max(batch) * len(batch) for batch in batches)

    assert 1 - lengths.sum() / computed < 0.05
    # And batches are still worth their name.
    assert computed / len(batches) > max_frames / 8


def test_planning_reads_no_further_than_a_window():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield read, 100

    first = next(split_windows(endless(), window=5000, max_items=8))

    assert len(first) == read == 50
