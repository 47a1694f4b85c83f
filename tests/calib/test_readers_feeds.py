"""Samples from Python objects: what may be re-read, what is refused, and that every pass is the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.readers import ReadLimits, fingerprint, from_iterable, split_held_out, take
from calib.types import Array, Dataset, Feed, InputInfo, SampleId

X = InputInfo("x", np.dtype(np.float32), ("batch", 3))
IDS = InputInfo("ids", np.dtype(np.int64), ("batch", None))


def feed(value: float) -> dict[str, Array]:
    return {"x": np.full((1, 3), value, np.float32)}


FEEDS = [feed(value) for value in range(5)]


def first_values(data: Dataset) -> list[float]:
    return [float(arrays["x"].flat[0]) for _, arrays in data]


class Reader:
    """A calibration reader as ONNX Runtime's examples write it."""

    def __init__(self) -> None:
        self.passes: Iterator[Feed] | None = None

    def get_next(self) -> Feed | None:
        if self.passes is None:
            self.passes = iter(FEEDS)
        return next(self.passes, None)

    def rewind(self) -> None:
        self.passes = None


class OldProtocol:
    def __getitem__(self, index: int) -> Feed:
        return FEEDS[index]


class Tensor:
    """What torch's and jax's arrays offer to numpy."""

    def __array__(self, dtype: object = None, copy: object = None) -> Array:
        return np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    "source",
    [
        FEEDS,
        tuple(FEEDS),
        lambda: iter(FEEDS),
        lambda: (item for item in FEEDS),
        Reader(),
        Reader,
        OldProtocol(),
        [item["x"] for item in FEEDS],
        lambda: [item["x"] for item in FEEDS],
        [(SampleId(index), item) for index, item in enumerate(FEEDS)],
        from_iterable(FEEDS, [X]),
    ],
    ids=[
        "list",
        "tuple",
        "iter",
        "generator",
        "reader",
        "reader-class",
        "getitem",
        "arrays",
        "arrays-fn",
        "samples",
        "dataset",
    ],
)
def test_every_source_is_the_same_data(source: object) -> None:
    data = from_iterable(source, [X])
    assert first_values(data) == [0, 1, 2, 3, 4]
    assert first_values(data) == [0, 1, 2, 3, 4]
    assert len(data) == 5
    assert [ident.index for ident, _ in data] == [0, 1, 2, 3, 4]
    assert fingerprint(data) == fingerprint(from_iterable(FEEDS, [X]))
    assert len(from_iterable(source, [X], limit=3)) == 3


def test_onnxruntime_reader_subclass() -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Subclass(Reader, quantization.CalibrationDataReader):  # type: ignore[misc]
        """Has __next__ from the base class: it must not be taken for a one-shot iterator."""

    data = from_iterable(Subclass(), [X])
    assert first_values(data) == first_values(data) == [0, 1, 2, 3, 4]


def test_one_feed_is_one_sample() -> None:
    assert len(list(from_iterable(feed(1), [X]))) == 1
    assert len(list(from_iterable(np.zeros((7, 3), np.float32), [X]))) == 1


def test_ids_and_tags_of_samples_are_kept() -> None:
    source = [(SampleId(7, "cat.png", {"timestep_idx": 3}), feed(1))]
    ((ident, _),) = from_iterable(source, [X])
    assert (ident.index, str(ident), ident.tags) == (7, "cat.png", {"timestep_idx": 3})


def test_arrays_of_other_libraries() -> None:
    ((_, arrays),) = from_iterable([{"x": Tensor()}], [X])
    assert type(arrays["x"]) is np.ndarray


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((item for item in FEEDS), "generator can be read only once; pass a list, or a function"),
        (iter(FEEDS), "list_iterator can be read only once"),
        (map(dict, FEEDS), "map can be read only once"),
        ("folder", "open_data"),
        (3, "int is not a collection of samples"),
        (None, "NoneType is not a collection"),
        (type("NoRewind", (), {"get_next": lambda self: None})(), "NoRewind has get_next but no rewind"),
    ],
)
def test_refused_at_once(source: object, message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        from_iterable(source, [X])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no samples"),
        (list, "no samples"),
        (
            [feed(0), {"y": feed(1)["x"]}],
            "sample 1: array 'y' is no input of the model, and input 'x' is missing",
        ),
        ([{"x": [[1.0, 2.0, 3.0]]}], "sample 0: 'x' is list, not an array"),
        ([{"x": np.zeros((1, 3), np.uint8)}], "sample 0: input 'x' has dtype uint8"),
        ([np.zeros(3, np.float32)], "sample 0: input 'x' has shape [3], rank 1"),
        (["a.npy"], "sample 0: 'x' is str, not an array"),
        ([None], "sample 0: 'x' is NoneType"),
        (lambda: None, "the function returned NoneType"),
        (lambda: feed(1), "the function returned dict"),
        (np.zeros((4, 2), np.float32), "axis 1 is 2 instead of 3"),
        ([(SampleId(0, "cat.png"), {"y": np.zeros(1)})], "cat.png: array 'y'"),
    ],
)
def test_refused_when_read(source: object, message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        list(from_iterable(source, [X]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bare_array_for_two_inputs() -> None:
    with pytest.raises(CalibrationError, match=r"sample 0: got ndarray, expected .* 'x', 'ids'"):
        list(from_iterable([np.zeros((1, 3), np.float32)], [X, IDS]))


def test_fixed_batch_names_the_python_cure() -> None:
    fixed = InputInfo("x", X.dtype, (1, 3))
    with pytest.raises(CalibrationError, match=r"axis 0 is 4 instead of 1; .*list\(x\[:, None\]\)"):
        list(from_iterable(np.zeros((4, 3), np.float32), [fixed]))


def same_iterator() -> Callable[[], Iterator[Feed]]:
    exhausted = iter(FEEDS)
    return lambda: exhausted


@pytest.mark.parametrize("counted_first", [True, False])
def test_function_that_is_not_fresh(counted_first: bool) -> None:
    data = from_iterable(same_iterator(), [X])
    if counted_first:
        assert len(data) == 5
    else:
        assert len([ident for ident, _ in data]) == 5  # list(data) would ask for the length first
    with pytest.raises(
        CalibrationError, match="gave 5 samples at first and 0 now; pass a list, or a function"
    ):
        list(data)


def test_part_of_a_source_that_is_not_fresh() -> None:
    exhausted = iter(FEEDS * 2)
    part, _, _ = split_held_out(from_iterable(lambda: exhausted, [X]))
    with pytest.raises(CalibrationError, match="gave 10 samples at first"):
        list(part)


def test_endless_source() -> None:
    def endless() -> Iterator[Feed]:
        return (feed(value) for value in itertools.count())

    assert first_values(from_iterable(endless, [X], limit=3)) == [0, 1, 2]
    assert first_values(take(from_iterable(endless, [X], limit=9), 2)) == [0, 1]
    with pytest.raises(CalibrationError, match="more than the 100 samples"):
        len(from_iterable(endless, [X], limits=ReadLimits(max_samples=100)))


def test_size_limit() -> None:
    with pytest.raises(CalibrationError, match="sample 0: one sample takes 12 bytes, more than the 8 bytes"):
        list(from_iterable(FEEDS, [X], limits=ReadLimits(max_sample_bytes=8)))


def test_errors_of_the_source_are_not_hidden() -> None:
    def broken() -> Iterator[Feed]:
        yield feed(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(from_iterable(broken, [X]))


def test_source_is_read_lazily() -> None:
    made = []

    def source() -> Iterator[Feed]:
        for value in range(5):
            made.append(value)
            yield feed(value)

    data = from_iterable(source, [X])
    assert made == []
    next(iter(data))
    assert made == [0]
