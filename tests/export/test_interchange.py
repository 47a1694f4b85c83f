"""Weight files of one tool as those of another: numbers, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from calib.types import Array
from onnxslim_ptq import quantize
from onnxslim_ptq.cli import main
from onnxslim_ptq.core.pack import pack_int4, unpack_int4, unpack_words
from onnxslim_ptq.errors import GraphError, RecipeError
from onnxslim_ptq.export.interchange import CONVERSIONS, convert
from onnxslim_ptq.export.packed_int4 import read_autoawq, read_autogptq
from onnxslim_ptq.export.read_weights import read_weight_files
from onnxslim_ptq.export.weight_files import WeightFiles
from tests.models import feeds_for, mlp

IN, OUT, GROUP = 64, 16, 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def numbers(seed: int = 0) -> tuple[Array, Array, Array]:
    """Codes [in, out] and zero points [groups, out] in 0..15, scales [groups, out]."""
    rng = np.random.default_rng(seed)
    zero = rng.integers(1, 16, (IN // GROUP, OUT))
    scale = rng.uniform(0.01, 0.1, (IN // GROUP, OUT)).astype(np.float16)
    return rng.integers(0, 16, (IN, OUT)), zero, scale


def words(values: Array, axis: int, order: Any = range(8)) -> Array:
    """8 neighbours along ``axis`` in an int32, nibble i holding neighbour order[i]."""
    moved = np.moveaxis(values, axis, -1).astype(np.uint32)
    parts = moved.reshape(*moved.shape[:-1], -1, 8)
    packed = np.zeros(parts.shape[:-1], np.uint32)
    for i, place in enumerate(order):
        packed |= parts[..., place] << np.uint32(4 * i)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def real(codes: Array, zero: Array, scale: Array, groups: Array | None = None) -> Array:
    index = np.arange(IN) // GROUP if groups is None else groups
    return (codes - zero[index]) * scale.astype(np.float32)[index]


class TestInt4:
    @pytest.mark.parametrize("version", [1, 2])
    def test_autogptq(self, version: int) -> None:
        codes, zero, scale = numbers()
        stored = zero - 1 if version == 1 else zero
        tensors = {
            "m.q.qweight": words(codes, 0),
            "m.q.qzeros": words(stored, 1),
            "m.q.scales": scale,
            "m.q.g_idx": (np.arange(IN) // GROUP).astype(np.int32),
            "m.q.bias": np.ones(OUT, np.float16),
            "embed": np.ones((2, 3), np.float32),
        }
        layers, others = read_autogptq(tensors, version=version)
        assert sorted(others) == ["embed", "m.q.bias"]
        assert layers["m.q"].order is None
        np.testing.assert_allclose(layers["m.q"].real(), real(codes, zero, scale), rtol=1e-6)

    def test_autogptq_in_order_of_importance(self) -> None:
        codes, zero, scale = numbers(1)
        groups = np.random.default_rng(2).permutation(np.arange(IN) // GROUP).astype(np.int32)
        tensors = {
            "q.qweight": words(codes, 0),
            "q.qzeros": words(zero - 1, 1),
            "q.scales": scale,
            "q.g_idx": groups,
        }
        layer = read_autogptq(tensors)[0]["q"]
        assert layer.order is not None
        np.testing.assert_array_equal(groups[layer.order], np.sort(groups))
        np.testing.assert_allclose(layer.real(), real(codes, zero, scale, groups), rtol=1e-6)

    def test_autoawq(self) -> None:
        codes, zero, scale = numbers(3)
        tensors = {
            "q.qweight": words(codes, 1, AWQ_ORDER),
            "q.qzeros": words(zero, 1, AWQ_ORDER),
            "q.scales": scale,
        }
        layer = read_autoawq(tensors)[0]["q"]
        np.testing.assert_allclose(layer.real(), real(codes, zero, scale), rtol=1e-6)

    def test_a_file_becomes_golden_sticks(self, tmp_path: Path) -> None:
        """w = (code + weight_zp) * weight_scale, weight_zp being negated."""
        codes, zero, scale = numbers(4)
        awq = {
            "q.qweight": words(codes, 1, AWQ_ORDER),
            "q.qzeros": words(zero, 1, AWQ_ORDER),
            "q.scales": scale,
            "q.bias": np.ones(OUT, np.float32),
            "norm.weight": np.ones(3, np.float32),
        }
        save_file(awq, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", tmp_path / "g.safetensors", "autoawq", "golden_stick")
        made = load_file(tmp_path / "g.safetensors")
        assert sorted(made) == [
            "norm.weight",
            "q._layer.bias",
            "q._layer.matmul.weight_scale",
            "q._layer.matmul.weight_zp",
            "q._layer.weight",
        ]
        assert made["q._layer.weight"].shape == (IN, OUT // 2)
        found = unpack_int4(made["q._layer.weight"]).astype(np.float32)
        index = np.arange(IN) // GROUP
        weight = (found + made["q._layer.matmul.weight_zp"][index]) * made["q._layer.matmul.weight_scale"][
            index
        ]
        np.testing.assert_allclose(weight, real(codes, zero, scale), rtol=1e-6)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"q.qzeros": None}, "layer 'q' has no tensor 'qzeros'"),
            ({"q.qweight": None}, "no tensor called <layer>.qweight"),
            ({"q.scales": np.ones((3, OUT), np.float16)}, "layer 'q': codes"),
            ({"q.qweight": np.ones((8, OUT), np.int64)}, "packed codes are int32"),
            ({"q.g_idx": np.zeros(IN, np.int32)}, "g_idx does not give each of 2 groups 32 rows"),
            ({"q.g_idx": np.full(IN, 2**31 - 1, np.int32)}, "g_idx does not give each of 2 groups 32 rows"),
            ({"q.g_idx": np.full(IN, -1, np.int32)}, "g_idx does not give each of 2 groups 32 rows"),
            ({"q.g_idx": np.zeros(IN, np.float32)}, "so is g_idx; g_idx is float32"),
            ({"q.g_idx": np.zeros((IN, 1), np.int32)}, r"g_idx has shape \[64, 1\], not 1 axes"),
            ({"q.qzeros": np.ones(8, np.int32)}, r"qzeros has shape \[8\], not 2 axes"),
        ],
    )
    def test_refused(self, change: dict[str, Any], text: str) -> None:
        codes, zero, scale = numbers()
        tensors = {"q.qweight": words(codes, 0), "q.qzeros": words(zero - 1, 1), "q.scales": scale}
        tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(GraphError, match=text):
            read_autogptq(tensors)

    def test_packing_is_undone(self) -> None:
        values = np.random.default_rng(0).integers(-8, 8, (5, 6)).astype(np.int8)
        np.testing.assert_array_equal(unpack_int4(pack_int4(values)), values)
        unsigned = np.random.default_rng(1).integers(0, 16, (4, 16))
        np.testing.assert_array_equal(unpack_words(words(unsigned, 1, AWQ_ORDER), 1, AWQ_ORDER), unsigned)
        with pytest.raises(ValueError, match="no pairs"):
            pack_int4(np.zeros((2, 3), np.int8))


def ascend_v1(folder: Path, recipe: Any = "w8a8-minmax") -> Path:
    """The description of a small network's weights as msModelSlim has them."""
    result = quantize(mlp(), recipe, feeds_for(mlp(), 8), target="generic", min_sqnr=0)
    result.save(folder / "m.onnx", weights=WeightFiles(("ascendV1",)))
    return folder / "quant_model_description.json"


class TestNames:
    @pytest.mark.parametrize("recipe", ["w8a8-minmax", "w8a8-dynamic", "w8a16"])
    def test_there_and_back(self, recipe: str, tmp_path: Path) -> None:
        description = ascend_v1(tmp_path / "a", recipe)
        convert(description, tmp_path / "g.safetensors", "ascend_v1", "golden_stick")
        convert(tmp_path / "g.safetensors", tmp_path / "back", "golden_stick", "ascend_v1")
        before, kinds = read_weight_files(description)
        after, kinds_after = read_weight_files(tmp_path / "back" / "quant_model_description.json")
        assert kinds_after == kinds
        assert sorted(after) == sorted(before)
        for name, values in before.items():
            assert after[name].dtype == values.dtype, name
            if name.endswith("weight_scale"):
                np.testing.assert_allclose(after[name], values, rtol=3e-7)  # deq / s_x, rounded once more
            else:
                np.testing.assert_array_equal(after[name], values)

    def test_what_the_parameters_say(self, tmp_path: Path) -> None:
        """y = (Σ q_x q_w + quant_bias) deq + bias gives what msModelSlim's tensors give."""
        before, _ = read_weight_files(ascend_v1(tmp_path / "a"))
        convert(
            tmp_path / "a" / "quant_model_description.json",
            tmp_path / "g.safetensors",
            "ascend_v1",
            "golden_stick",
        )
        made = load_file(tmp_path / "g.safetensors")
        layer = next(n.removesuffix(".deq_scale") for n in before if n.endswith(".deq_scale"))
        q_x = np.random.default_rng(0).integers(-128, 128, (5, before[f"{layer}.weight"].shape[1]))
        sums = q_x @ before[f"{layer}.weight"].astype(np.int64).T
        deq = before[f"{layer}.deq_scale"].astype(np.int32).view(np.float32)
        theirs = (sums + before[f"{layer}.quant_bias"]) * deq
        same = made[f"{layer}._layer.matmul.dequant_scale"].astype(np.int32).view(np.float32)
        ours = (sums + made[f"{layer}._layer.matmul.quant_bias"]) * same + made[f"{layer}._layer.bias"]
        np.testing.assert_allclose(ours, theirs, atol=float(deq.max()))
        assert made[f"{layer}.quant_op.input_zp"].dtype == np.int8

    def test_a_missing_parameter(self, tmp_path: Path) -> None:
        convert(ascend_v1(tmp_path / "a"), tmp_path / "g.safetensors", "ascend_v1", "golden_stick")
        made = load_file(tmp_path / "g.safetensors")
        gone = next(name for name in made if name.endswith("quant_bias"))
        save_file({k: v for k, v in made.items() if k != gone}, tmp_path / "g.safetensors")
        with pytest.raises(GraphError, match=r"has no parameter '_layer\.matmul\.quant_bias'"):
            convert(tmp_path / "g.safetensors", tmp_path / "back", "golden_stick", "ascend_v1")
        assert not (tmp_path / "back").exists()

    def test_unknown_pairs(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="no way from 'autoawq' to 'ascend_v1'; there are"):
            convert(tmp_path, tmp_path, "autoawq", "ascend_v1")
        assert len(CONVERSIONS) == 5

    @pytest.mark.parametrize(
        ("source", "out", "text"),
        [
            ("a", "g.safetensors", "holds no .safetensors"),
            ("none.safetensors", "g.safetensors", "cannot be read"),
            ("q.safetensors", "g.bin", "must end in .safetensors"),
            ("q.safetensors", "q.safetensors", "is the same file as the input"),
        ],
    )
    def test_bad_paths(self, source: str, out: str, text: str, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        codes, zero, scale = numbers()
        save_file(
            {"q.qweight": words(codes, 0), "q.qzeros": words(zero - 1, 1), "q.scales": scale},
            tmp_path / "q.safetensors",
        )
        with pytest.raises(GraphError, match=text):
            convert(tmp_path / source, tmp_path / out, "autogptq", "golden_stick")

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        description = ascend_v1(tmp_path / "a")
        out = tmp_path / "g.safetensors"
        assert (
            main(
                [
                    "convert",
                    str(description),
                    str(out),
                    "--from",
                    "ascend_v1",
                    "--to",
                    "golden_stick",
                    "--json",
                ]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["files"] == [str(out)]
        assert out.is_file()


class TestFormsThatTheOtherSideLacks:
    """What a format cannot say is refused, not left out."""

    def test_int4_of_a_square_layer(self, tmp_path: Path) -> None:
        """[n, n / 2] bytes and n scales look like int8 of half as many inputs."""
        codes, zero, scale = np.full((16, 16), 9), np.full((1, 16), 8), np.ones((1, 16), np.float16)
        packed = {"q.qweight": words(codes, 0), "q.qzeros": words(zero - 1, 1), "q.scales": scale}
        save_file(packed, tmp_path / "a.safetensors")
        convert(tmp_path / "a.safetensors", tmp_path / "g.safetensors", "autogptq", "golden_stick")
        assert load_file(tmp_path / "g.safetensors")["q._layer.weight"].shape == (16, 8)
        with pytest.raises(GraphError, match="layer 'q' has 4 bits"):
            convert(tmp_path / "g.safetensors", tmp_path / "back", "golden_stick", "ascend_v1")

    @pytest.mark.parametrize(
        ("part", "values", "text"),
        [
            ("_layer.matmul.smooth_scale", np.ones(8, np.float32), r"smoothed per channel \(smooth_scale\)"),
            ("_layer.matmul.perm", np.arange(8, dtype=np.int32), "layer 'q' has 4 bits"),
            ("_layer.weight", np.ones((4, 8), np.float32), "its weight is float32"),
        ],
    )
    def test_of_golden_stick(self, part: str, values: Array, text: str, tmp_path: Path) -> None:
        layer = {
            "q._layer.weight": np.ones((4, 8), np.int8),
            "q._layer.matmul.weight_scale": np.ones(4, np.float32),
        }
        save_file({**layer, f"q.{part}": values}, tmp_path / "g.safetensors")
        with pytest.raises(GraphError, match=text):
            convert(tmp_path / "g.safetensors", tmp_path / "back", "golden_stick", "ascend_v1")

    @pytest.mark.parametrize(
        ("kind", "change", "text"),
        [
            ("W8A8_TIMESTEP", {}, "layer 'q' of kind W8A8_TIMESTEP has int8 weights"),
            ("W4A16", {}, "layer 'q' of kind W4A16"),
            ("W8A16", {"q.weight_scale": np.ones((4, 2), np.float32)}, "and 8 scales"),
            ("W8A8_DYNAMIC", {"q.weight_offset": np.ones((4, 1), np.float32)}, "has asymmetric weights"),
            ("W8A16", {"q.weight": None}, "layer 'q' has no tensor 'weight'"),
        ],
    )
    def test_of_msmodelslim(self, kind: str, change: dict[str, Any], text: str, tmp_path: Path) -> None:
        tensors = {
            "q.weight": np.ones((4, 8), np.int8),
            "q.weight_scale": np.ones((4, 1), np.float32),
            "q.weight_offset": np.zeros((4, 1), np.float32),
        }
        tensors = {name: v for name, v in {**tensors, **change}.items() if v is not None}
        save_file(tensors, tmp_path / "w.safetensors")
        description = {"model_quant_type": kind, **dict.fromkeys(tensors, kind)}
        (tmp_path / "d.json").write_text(json.dumps(description))
        with pytest.raises(GraphError, match=text):
            convert(tmp_path / "d.json", tmp_path / "g.safetensors", "ascend_v1", "golden_stick")

    def test_zero_points_of_weights_alone(self, tmp_path: Path) -> None:
        offset = np.array([[3], [0], [-2], [1]], np.float32)
        tensors = {
            "q.weight": np.ones((4, 8), np.int8),
            "q.weight_scale": np.ones((4, 1), np.float32),
            "q.weight_offset": offset,
        }
        save_file(tensors, tmp_path / "w.safetensors")
        description = {"model_quant_type": "W8A16", **dict.fromkeys(tensors, "W8A16")}
        (tmp_path / "d.json").write_text(json.dumps(description))
        convert(tmp_path / "d.json", tmp_path / "g.safetensors", "ascend_v1", "golden_stick")
        made = load_file(tmp_path / "g.safetensors")
        np.testing.assert_array_equal(made["q._layer.matmul.weight_zp"], -offset[:, 0])
        convert(tmp_path / "g.safetensors", tmp_path / "back", "golden_stick", "ascend_v1")
        after, _ = read_weight_files(tmp_path / "back" / "quant_model_description.json")
        np.testing.assert_array_equal(after["q.weight_offset"], offset)

    def test_metadata_that_is_not_ours(self, tmp_path: Path) -> None:
        layer = {"q._layer.weight": np.ones((4, 8), np.int8)}
        save_file(layer, tmp_path / "g.safetensors", metadata={"packed_int4": '["q"]'})
        with pytest.raises(GraphError, match="its metadata 'packed_int4' is no table"):
            convert(tmp_path / "g.safetensors", tmp_path / "back", "golden_stick", "ascend_v1")

    def test_inputs_are_never_written_over(self, tmp_path: Path) -> None:
        description = ascend_v1(tmp_path / "a")
        own = tmp_path / "a" / "quant_model_weight_w8a8.safetensors"
        before = own.read_bytes()
        with pytest.raises(GraphError, match="is the same file as the input"):
            convert(description, own, "ascend_v1", "golden_stick")
        assert own.read_bytes() == before
