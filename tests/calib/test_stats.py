"""What every statistic promises: exact merging in any order, ragged and empty tensors, bounded memory."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import CalibrationError
from calib.stats import COLLECTORS
from calib.types import Array, Probe, SampleId, Stats

KINDS = ["channel", "channel_histogram", "gram", "histogram", "minmax", "series"]
CHANNELS = 3
WILD = [0.0, -0.0, 1.0, -1e-40, 1e-30, -3.5e38 / 2, 65504.0, float("nan"), float("inf"), float("-inf")]


def new(kind: str, **options: float) -> Stats:
    return COLLECTORS[kind](Probe("t", kind, axis=-1, options=tuple(options.items())))


def gathered(kind: str, samples: Sequence[tuple[int, Array]]) -> Stats:
    stats = new(kind)
    for index, x in samples:
        stats.update(x, SampleId(index, f"s{index}"))
    return stats


def assert_same(a: Stats, b: Stats) -> None:
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.tobytes() == right[name].tobytes(), name


@st.composite
def sample_lists(draw: st.DrawFn) -> list[tuple[int, Array]]:
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    samples = []
    for index in range(draw(st.integers(1, 6))):
        rows = draw(st.integers(0, 5))
        x = generator.standard_normal((rows, CHANNELS)) * 10.0 ** generator.uniform(-20, 18, (rows, CHANNELS))
        if rows and draw(st.booleans()):
            x[0, 0] = draw(st.sampled_from(WILD))
        with np.errstate(over="ignore"):
            samples.append((index, x.astype(draw(st.sampled_from(["f4", "f8", "f2"])))))
    return samples


@pytest.mark.parametrize("kind", KINDS)
@given(samples=sample_lists(), seed=st.integers(0, 1000))
def test_any_sharding_in_any_order_gives_the_same_state(
    kind: str, samples: list[tuple[int, Array]], seed: int
) -> None:
    whole = gathered(kind, samples)
    order = random.Random(seed)
    shuffled = samples[:]
    order.shuffle(shuffled)
    shards = [shuffled[i::3] for i in range(3)]
    order.shuffle(shards)
    merged = new(kind)
    for shard in shards:
        merged.merge(gathered(kind, shard))
    assert_same(merged, whole)
    assert_same(gathered(kind, shuffled), whole)


@pytest.mark.parametrize("kind", KINDS)
@given(samples=sample_lists())
def test_state_round_trip_goes_on_where_it_stopped(kind: str, samples: list[tuple[int, Array]]) -> None:
    half = len(samples) // 2
    resumed = COLLECTORS[kind].from_state(gathered(kind, samples[:half]).state())
    for index, x in samples[half:]:
        resumed.update(x, SampleId(index, f"s{index}"))
    assert_same(resumed, gathered(kind, samples))


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_a_copy(kind: str) -> None:
    stats = gathered(kind, [(0, np.ones((2, CHANNELS), np.float32))])
    before = {name: value.copy() for name, value in stats.state().items()}
    kept = stats.state()
    stats.update(np.full((2, CHANNELS), 7, np.float32), SampleId(1))
    for name, value in kept.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, CHANNELS), (2, 0, CHANNELS), (4, 0)])
def test_zero_size_contributes_nothing(kind: str, shape: tuple[int, ...]) -> None:
    assert_same(gathered(kind, [(0, np.zeros(shape, np.float32))]), new(kind))
    full = (1, np.ones((2, CHANNELS), np.float32))
    assert_same(gathered(kind, [(0, np.zeros(shape, np.float32)), full]), gathered(kind, [full]))


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_ranks_and_dtypes(kind: str) -> None:
    generator = np.random.default_rng(0)
    samples: list[tuple[int, Array]] = []
    for index, (shape, dtype) in enumerate(
        [
            ((5, 3), "f4"),
            ((2, 7, 3), "f2"),
            ((3,), "f8"),
            ((1, 3), "i8"),
            ((4, 3), "i1"),
            ((2, 3), "?"),
            ((2, 3), "u1"),
        ]
    ):
        samples.append((index, (generator.standard_normal(shape) * 3).astype(dtype)))
    samples.append((9, np.asfortranarray(generator.standard_normal((6, 3)).astype(np.float32))))
    samples.append((10, generator.standard_normal((8, 6)).astype(np.float32)[::2, ::2]))
    assert_same(gathered(kind, samples), gathered(kind, [(i, np.ascontiguousarray(x)) for i, x in samples]))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "series"])
def test_memory_does_not_grow_with_samples(kind: str) -> None:
    x = np.linspace(-1, 1, 4 * CHANNELS, dtype=np.float32).reshape(4, CHANNELS)
    sizes = [
        sum(v.nbytes for v in gathered(kind, [(i, x * (i + 1)) for i in range(count)]).state().values())
        for count in (1, 50)
    ]
    assert sizes[0] == sizes[1]


def test_series_grows_by_48_bytes_a_sample() -> None:
    x = np.ones(1000, np.float32)
    sizes = [
        sum(v.nbytes for v in gathered("series", [(i, x) for i in range(count)]).state().values())
        for count in (1, 11)
    ]
    assert sizes[1] - sizes[0] == 480


@pytest.mark.parametrize("kind", KINDS)
def test_errors_say_what_and_where(kind: str) -> None:
    with pytest.raises(CalibrationError, match="'t': unknown option 'bogus'"):
        new(kind, bogus=1)
    with pytest.raises(CalibrationError, match="complex64"):
        new(kind).update(np.ones((2, CHANNELS), np.complex64), SampleId(0))
    other = "histogram" if kind == "minmax" else "minmax"
    with pytest.raises(TypeError, match="cannot merge"):
        new(kind).merge(new(other))


@pytest.mark.parametrize("kind", ["channel", "channel_histogram", "gram"])
def test_a_channel_axis_keeps_its_size(kind: str) -> None:
    stats = gathered(kind, [(0, np.ones((2, 3), np.float32))])
    with pytest.raises(CalibrationError, match=r"axis -1 had 3 channels before s1, whose shape is \[2, 4\]"):
        stats.update(np.ones((2, 4), np.float32), SampleId(1, "s1"))
    with pytest.raises(CalibrationError, match="no axis"):
        stats.update(np.float32(1.0).reshape(()), SampleId(2))
    with pytest.raises(CalibrationError, match="channels"):
        stats.merge(gathered(kind, [(1, np.ones((2, 4), np.float32))]))
    with pytest.raises(CalibrationError, match="axis"):
        stats.merge(COLLECTORS[kind](Probe("t", kind, axis=0)))


def test_the_bad_sample_with_the_lowest_index_is_named() -> None:
    good, bad = np.ones(CHANNELS, np.float32), np.array([1, np.nan, np.inf], np.float32)
    late, early = gathered("minmax", [(7, bad), (3, good)]), gathered("minmax", [(5, bad), (9, bad)])
    late.merge(early)
    state = late.state()
    assert int(state["bad_index"]) == 5
    assert state["bad_name"].tobytes().decode() == "s5"
    assert (int(state["count"]), int(state["nan"]), int(state["inf"])) == (6, 3, 3)
    assert (float(state["lo"]), float(state["hi"])) == (1, 1)
