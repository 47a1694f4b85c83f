"""Text and JSONL files as samples: tokens, the inputs that follow from them, and lines that are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import CalibrationError
from calib.readers import ReadLimits, fingerprint, open_data, take
from calib.readers.files import HowToRead
from calib.readers.text import TextSettings
from calib.types import Dataset, InputInfo
from calib.workers.luggage import is_portable

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "one", "two", "three", "four", "five"]
ID = {word: index for index, word in enumerate(WORDS)}


def ints(name: str, *shape: int | str | None, dtype: Any = np.int64) -> InputInfo:
    return InputInfo(name, np.dtype(dtype), shape)


BERT = [ints(name, "batch", "seq") for name in ("input_ids", "attention_mask", "token_type_ids")]
PAST = InputInfo("past_key_values.0.key", np.dtype(np.float32), ("batch", 3, "past", 64))
DECODER = [*BERT[:2], ints("position_ids", "batch", "seq"), PAST]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words between [CLS] and [SEP]."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def opened(path: Path, tokenizer: Path | None, inputs: Any = BERT, **more: Any) -> Dataset:
    settings = {key: more.pop(key) for key in list(more) if key not in ("limit", "limits", "said")}
    how = HowToRead(text=TextSettings(tokenizer, **settings) if tokenizer else None)
    return open_data([path], inputs, how=how, **more)


def write(folder: Path, *lines: Any, name: str = "t.txt") -> Path:
    path = folder / "texts" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def ids(data: Dataset) -> list[list[int]]:
    return [feed["input_ids"][0].tolist() for _, feed in data]


def fails(make: Any, *parts: str) -> None:
    with pytest.raises(CalibrationError) as error:
        list(make())
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


class TestText:
    def test_one_sample_per_line(self, tmp_path: Path, tokenizer: Path) -> None:
        path = write(tmp_path, "one two", "", "   ", "three\r", "nothing known")
        said: list[str] = []
        data = opened(path, tokenizer, said=said)
        assert ids(data) == [[1, 4, 5, 2], [1, 6, 2], [1, 0, 0, 2]]
        assert [str(ident) for ident, _ in data] == ["t.txt:1", "t.txt:4", "t.txt:5"]
        for _, feed in data:
            assert list(feed) == [info.name for info in BERT]
            assert (feed["attention_mask"] == 1).all()
            assert (feed["token_type_ids"] == 0).all()
        assert said == [f"3 texts from {path.name}: tokenizer tokenizer.json, at most 512 tokens, not padded"]

    def test_reads_again_and_in_part(self, tmp_path: Path, tokenizer: Path) -> None:
        write(tmp_path, "one", "two", name="a.txt")
        write(tmp_path, "three", "", "four", name="b.txt")
        data = opened(tmp_path / "texts", tokenizer)
        assert len(data) == 4
        assert fingerprint(data) == fingerprint(data)
        assert ids(opened(tmp_path / "texts", tokenizer, limit=3)) == ids(take(data, 3))
        assert fingerprint(opened(tmp_path / "texts", tokenizer, max_length=2)) != fingerprint(data)

    def test_workers_read_it_themselves(self, tmp_path: Path, tokenizer: Path) -> None:
        data = opened(write(tmp_path, "one", "two"), tokenizer)
        assert is_portable(data)
        assert fingerprint(copy.deepcopy(data)) == fingerprint(
            data
        )  # by the way that takes it to another process

    def test_a_byte_order_mark_is_no_word(self, tmp_path: Path, tokenizer: Path) -> None:
        assert ids(opened(write(tmp_path, "\ufeffone"), tokenizer)) == [[1, 4, 2]]

    def test_cut_and_padded(self, tmp_path: Path, tokenizer: Path) -> None:
        path = write(tmp_path, "one two three four", "one")
        assert ids(opened(path, tokenizer, max_length=4)) == [[1, 4, 5, 2], [1, 4, 2]]
        padded = opened(path, tokenizer, max_length=5, padding=True)
        assert ids(padded) == [[1, 4, 5, 6, 2], [1, 4, 2, 3, 3]]
        assert [feed["attention_mask"][0].tolist() for _, feed in padded] == [[1] * 5, [1, 1, 1, 0, 0]]
        fails(
            lambda: opened(path, tokenizer, max_length=4, truncation=False), "t.txt:1", "6 tokens, not 1 to 4"
        )
        assert ids(opened(path, tokenizer, add_special_tokens=False))[1] == [4]

    def test_a_fixed_length_pads_by_itself(self, tmp_path: Path, tokenizer: Path) -> None:
        inputs = [ints(info.name, 1, 6, dtype=np.int32) for info in BERT]
        data = opened(write(tmp_path, "one", "one two three four five one"), tokenizer, inputs)
        assert ids(data) == [[1, 4, 2, 3, 3, 3], [1, 4, 5, 6, 7, 2]]
        assert all(array.dtype == np.int32 for _, feed in data for array in feed.values())
        fails(
            lambda: opened(tmp_path / "texts", tokenizer, inputs, max_length=7), "max_length: is 7", "takes 6"
        )

    def test_positions_and_an_empty_past(self, tmp_path: Path, tokenizer: Path) -> None:
        said: list[str] = []
        ((_, feed),) = opened(
            write(tmp_path, "one"), tokenizer, DECODER, max_length=5, padding=True, said=said
        )
        assert feed["position_ids"].tolist() == [[0, 1, 2, 2, 2]]
        assert feed["past_key_values.0.key"].shape == (1, 3, 0, 64)
        assert said[0].endswith("padded to 5, 1 empty past inputs")


class TestJsonl:
    def test_texts_and_prompts(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = [{"text": "one", "id": 7}, {"prompt": "two", "answer": [1]}, "three"]
        path = write(tmp_path, *rows[:2], json.dumps(rows[2]), name="t.jsonl")
        assert ids(opened(path, tokenizer)) == [[1, 4, 2], [1, 5, 2], [1, 6, 2]]

    def test_numbers_under_input_names(self, tmp_path: Path, tokenizer: Path) -> None:
        """A missing leading axis is added, what follows from the ids is filled in, and tags are kept."""
        path = write(tmp_path, {"input_ids": [4, 5], "timestep_idx": 3}, {"input_ids": [[6]]}, name="t.jsonl")
        data = opened(path, tokenizer, DECODER)
        assert ids(data) == [[4, 5], [6]]
        assert [dict(ident.tags) for ident, _ in data] == [{"timestep_idx": 3}, {}]
        assert [feed["position_ids"].shape for _, feed in data] == [(1, 2), (1, 1)]

    def test_numbers_need_no_tokenizer(self, tmp_path: Path) -> None:
        x = InputInfo("x", np.dtype(np.float32), (1, 3))
        ((_, feed),) = opened(write(tmp_path, {"x": [1, 2.5, 3]}, name="t.jsonl"), None, [x])
        assert feed["x"].tolist() == [[1, 2.5, 3]]

    def test_numbers_beyond_the_type(self, tmp_path: Path) -> None:
        x = InputInfo("x", np.dtype(np.float32), (1, 2))
        fails(
            lambda: opened(write(tmp_path, '{"x": [1e39, 1]}', name="t.jsonl"), None, [x]),
            "t.jsonl:1",
            "beyond",
        )

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("{", "not a line of JSON"),
            ("[" * 100_000, "not a line of JSON"),
            ("1" * 5_000, "not a line of JSON"),
            ("[1, 2]", "is list, not an object"),
            ('{"txt": "one"}', "neither 'text' nor 'prompt' nor an input"),
            ('{"text": 3}', "its text is int"),
            ('{"input_ids": [4], "label": 1}', "'label' is no input of the model"),
            ('{"input_ids": [4.5]}', "no values of int64"),
            ('{"input_ids": [[4], [4, 5]]}', "no values of int64"),
            ('{"input_ids": ["4"]}', "no values of int64"),
            ('{"input_ids": [99999999999999999999]}', "int64"),
            ('{"input_ids": {"a": 1}}', "no values of int64"),
            ('{"input_ids": [NaN]}', "no values of int64"),
            ('{"input_ids": [4], "timestep_idx": [1, 2]}', "a tag is one integer"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, tokenizer: Path, line: str, words: str) -> None:
        path = write(tmp_path, '{"text": "one"}', line, name="t.jsonl")
        fails(lambda: opened(path, tokenizer), "t.jsonl:2", words)


class TestRefused:
    def test_without_tokenizer(self, tmp_path: Path) -> None:
        fails(lambda: opened(write(tmp_path, "one"), None), "t.txt: text needs the model's tokenizer")
        path = write(tmp_path, {"text": "one"}, name="t.jsonl")
        fails(lambda: opened(path, None), "t.jsonl:1: text needs the model's tokenizer")

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "BPE"}}', "\0" * 9])
    def test_no_tokenizer_file(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "bad.json").write_text(content)
        fails(lambda: opened(write(tmp_path, "one"), tmp_path / "bad.json"), "bad.json: not a tokenizer file")
        fails(
            lambda: opened(write(tmp_path, "one"), tmp_path / "none.json"),
            "none.json: no such tokenizer file",
        )

    def test_another_model(self, tmp_path: Path, tokenizer: Path) -> None:
        fails(
            lambda: opened(write(tmp_path, "one"), tokenizer, [ints("ids", 1, "n")]), "'input_ids'", "'ids'"
        )
        inputs = [*BERT, ints("language", 1)]
        fails(
            lambda: opened(write(tmp_path, "one"), tokenizer, inputs), "t.txt:1: input 'language' is missing"
        )

    def test_no_pad_token(self, tmp_path: Path) -> None:
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(
            str(tmp_path / "t.json")
        )
        path = write(tmp_path, "a")
        fails(
            lambda: opened(path, tmp_path / "t.json", padding=True), "padding needs a pad token", "pad_token"
        )
        fails(lambda: opened(path, tmp_path / "t.json", padding=True, pad_token="x"), "'x'")
        ((_, feed),) = opened(path, tmp_path / "t.json", padding=True, pad_token="a", max_length=3)
        assert feed["attention_mask"].tolist() == [[1, 0, 0]]

    def test_lines(self, tmp_path: Path, tokenizer: Path) -> None:
        path = write(tmp_path, "one", "two " * 100)
        fails(
            lambda: opened(path, tokenizer, limits=ReadLimits(max_line_bytes=50)),
            "t.txt:2: longer than 50 bytes",
        )
        fails(lambda: opened(path, tokenizer, limits=ReadLimits(max_samples=1)), "more than the 1 samples")
        path.write_bytes(b"one\n\xff\xfe\n")
        fails(lambda: opened(path, tokenizer), "t.txt:2: not UTF-8")
        path.write_bytes(b"\n \n")
        fails(lambda: opened(path, tokenizer), "no samples")

    def test_no_tokens(self, tmp_path: Path, tokenizer: Path) -> None:
        path = write(tmp_path, {"text": ""}, name="t.jsonl")
        fails(lambda: opened(path, tokenizer, add_special_tokens=False), "t.jsonl:1: gives no token")

    def test_without_tokenizers(
        self, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
        fails(lambda: opened(write(tmp_path, "one"), tokenizer), "pip install 'onnxslim_ptq[text]'")
