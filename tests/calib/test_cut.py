"""Where a model is cut, what the blocks are, and that together they are the model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest

from calib.blocks.cut import Layout, extract, find_cuts
from calib.errors import GraphError
from calib.model import Model, open_model
from calib.scope import reads
from tests.models import parse, weights_of

# Wide, a bottleneck of 8 values, wide again; `c` goes along beside it.
BODY = """g (float[N,64] x) => (float[N,64] y) {
    [one] a = MatMul (x, w1)
    [two] b = Relu (a)
    [three] n = MatMul (b, w2)
    [four] m = Tanh (n)
    [five] d = MatMul (m, w3)
    [six] y = Add (d, x)
}"""
CAPTURING = """g (float[N,64] x, bool flag) => (float[N,64] y) {
    [one] a = MatMul (x, w1)
    [two] b = Relu (a)
    [branch] c = If (flag) <
        then_branch = t () => (float[N,64] t1) { t1 = Add (a, w1row) },
        else_branch = e () => (float[N,64] e1) { e1 = Mul (b, b) }
    >
    [last] y = Add (c, b)
}"""


def bottleneck() -> Model:
    return open_model(parse(BODY, weights_of(0, w1=(64, 256), w2=(256, 8), w3=(8, 64)), 17, 8))


def capturing() -> Model:
    return open_model(parse(CAPTURING, weights_of(0, w1=(64, 64), w1row=(64,)), 17, 8))


def layout_of(model: Model, wanted: list[str], rows: int = 10) -> Layout:
    return Layout(model, wanted, {"x": (rows, 64), "flag": ()})


class TestLayout:
    def test_bytes_of_values_follow_from_the_sample(self) -> None:
        sizes = layout_of(bottleneck(), ["y"], rows=10).nbytes
        assert (sizes["a"], sizes["n"], sizes["y"]) == (10 * 256 * 4, 10 * 8 * 4, 10 * 64 * 4)

    def test_crossing_counts_what_is_read_later_but_no_graph_input(self) -> None:
        """x is read by the last node and crosses every cut: it comes from the data again."""
        cost = layout_of(bottleneck(), ["n", "y"], rows=1).crossing()
        watched, not_watched = 8 * 4, 2 * 8 * 4
        assert list(cost) == [0, 2 * 1024, 2 * 1024, watched, not_watched, 2 * 256, 0]

    def test_nodes_that_lead_nowhere_are_left_out(self) -> None:
        layout = layout_of(bottleneck(), ["n"])
        assert layout.nodes == [0, 1, 2]

    def test_a_subgraph_reads_what_it_captures(self) -> None:
        model = capturing()
        assert reads(model.proto.graph.node[2]) == {"flag", "a", "b", "w1row"}
        assert layout_of(model, ["y"]).last["a"] == 2

    def test_values_of_unknown_type_cannot_be_cut(self) -> None:
        model = bottleneck()
        model.proto.graph.node[3].domain = "custom"
        model.proto.opset_import.add(domain="custom", version=1)
        assert np.isinf(layout_of(model, ["y"]).crossing()).tolist() == [False] * 4 + [True, True, False]


class TestCuts:
    def test_the_bottleneck_is_where_it_is_cut(self) -> None:
        layout = layout_of(bottleneck(), ["y"])
        whole = max(layout.loads(0))
        assert find_cuts(layout, whole) == []
        assert find_cuts(layout, whole - 1) in ([3], [4])

    def test_no_block_exceeds_the_budget_where_nodes_allow_that(self) -> None:
        layout = layout_of(bottleneck(), ["y"])
        alone = max(next(layout.loads(i)) for i in range(len(layout.nodes)))
        cuts = find_cuts(layout, alone)
        edges = [0, *cuts, len(layout.nodes)]
        assert cuts
        for start, stop in pairwise(edges):
            assert list(layout.loads(start))[stop - start - 1] <= alone

    def test_a_budget_below_a_single_node_still_gives_blocks(self) -> None:
        layout = layout_of(bottleneck(), ["y"])
        assert find_cuts(layout, 1) == [1, 2, 3, 4, 5]

    def test_a_model_out_of_order_is_refused(self) -> None:
        model = bottleneck()
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.proto.graph.node]
        del model.proto.graph.node[:]
        model.proto.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])
        with pytest.raises(GraphError, match=r"reads 'a', which is made later; sort the graph"):
            find_cuts(layout_of(model, ["y"]), 1)


class TestBlocks:
    @pytest.mark.parametrize("make", [bottleneck, capturing])
    def test_blocks_partition_the_nodes_and_say_what_they_read_and_leave(self, make: object) -> None:
        model: Model = make()  # type: ignore[operator]
        layout = layout_of(model, ["y"])
        blocks = layout.blocks(range(1, len(layout.nodes)))
        assert [n for b in blocks for n in b.nodes] == list(range(len(model.proto.graph.node)))
        left: set[str] = set()
        for block in blocks:
            assert set(block.reads) <= left | layout.inputs
            left |= set(block.leaves)

    def test_an_extracted_block_is_a_valid_model_with_its_weights_only(self) -> None:
        model = bottleneck()
        layout = layout_of(model, ["y"])
        parts = [extract(layout, b, b.leaves or ("y",)) for b in layout.blocks([3])]
        assert [sorted(p.weights) for p in parts] == [["w1", "w2"], ["w3"]]
        assert parts[1].weights["w3"] is model.weights["w3"]
        (crossing,) = [i for i in parts[1].proto.graph.input if i.name == "n"]
        dims = crossing.type.tensor_type.shape.dim
        assert [d.dim_value or None for d in dims] == [None, 8], "only what holds for every sample is fixed"
