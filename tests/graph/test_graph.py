"""The graph view: what goes in comes out, whatever graphsurgeon cannot hold, and edits keep every index right."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.errors import GraphError
from calib.model import open_model
from onnxslim_ptq.graph.graph import Graph
from tests.graph.models import embedded, graph_of, parse, run, same_outputs

W = np.linspace(-1, 1, 512, dtype=np.float32).reshape(16, 32)
LAYER = "g (float[N,16] x) => (float[N,32] y) { [mm] a = MatMul (x, w) [act] y = Relu (a) }"


def trip(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model after Graph(model).to_model(), with its weights, checked."""
    result = embedded(Graph(open_model(proto)).to_model())
    onnx.checker.check_model(result, full_check=True)
    return result


class TestNames:
    def test_unnamed_and_duplicate_nodes(self) -> None:
        body = (
            "g (float[4] x) => (float[4] y) "
            "{ a = Relu (x) [n] b = Relu (a) [n] c = Neg (b) [Relu_a] d = Abs (c) y = Exp (d) }"
        )
        proto = parse(body)
        proto.graph.node[4].name = "n#2"
        graph = Graph(open_model(proto))
        assert [n.name for n in graph.nodes] == ["Relu_a#2", "n", "n#3", "Relu_a", "n#2"]
        assert [n.name for n in Graph(graph.to_model()).nodes] == [n.name for n in graph.nodes]
        run(
            graph.to_model(), {"x": np.ones(4, np.float32)}
        )  # the source does not load: ONNX Runtime wants unique names

    def test_nodes_without_named_output(self) -> None:
        proto = parse("g (float[4] x) => (float[4] y) { y = Relu (x) }")
        proto.graph.node.insert(0, helper.make_node("Dropout", ["x"], ["", "m"]))
        proto.graph.node.insert(0, helper.make_node("Sink", ["x"], [], domain="local"))
        assert [n.name for n in Graph(open_model(proto)).nodes] == ["Sink_0", "Dropout_m", "Relu_y"]

    def test_made_names_are_unique(self) -> None:
        graph = graph_of(LAYER, {"w": W})
        assert [graph.variable(n).name for n in ("x", "x", "new", "new")] == ["x_1", "x_2", "new", "new_1"]
        assert graph.constant("w", W).name == "w_1"
        node = graph.add_node("Neg", "mm", [graph.tensor("a")], [graph.variable("b")])
        assert node.name == "mm_1"
        assert graph.node("mm_1") is node


class TestBoundaries:
    def test_initializers_that_are_inputs(self) -> None:
        proto = parse(
            "g (float[N,16] x, float[16,32] w) => (float[N,32] y) { y = MatMul (x, w) }", {"w": W}, ir=3
        )
        graph = Graph(open_model(proto))
        assert graph.notes == ["1 initializers were also graph inputs; they are constants now (first: w)"]
        after = graph.to_model()
        assert [i.name for i in after.proto.graph.input] == ["x"]
        assert after.proto.ir_version == 4
        same_outputs(proto, after, feeds=[{"x": np.ones((2, 16), np.float32)}])

    def test_input_that_is_an_output(self) -> None:
        proto = parse("g (float[4] x) => (float[4] x, float[4] y) { y = Relu (x) }")
        assert trip(proto).graph.output == proto.graph.output

    def test_constants_that_are_outputs(self) -> None:
        body = (
            "g (float[4] x) => (float[16,32] w, float[2] k, float[4] y) "
            "{ k = Constant <value = float[2] {1, 2}> () y = Relu (x) }"
        )
        proto = parse(body, {"w": W})
        after = trip(proto)
        assert [n.op_type for n in after.graph.node] == ["Constant", "Relu"]
        same_outputs(proto, after)

    def test_order_of_initializers_is_stable(self) -> None:
        names = [f"k{i}" for i in range(30)]
        chain = " ".join(f"t{i + 1} = Add (t{i}, k{29 - i})" for i in range(30))
        outputs = ", ".join(f"float[4] {n}" for n in names[:9])
        body = f"g (float[4] t0) => (float[4] t30, {outputs}) {{ {chain} }}"
        graph = graph_of(body, {n: np.ones(4, np.float32) for n in names})
        assert [t.name for t in graph.to_model().proto.graph.initializer] == names

    def test_unsorted_nodes_are_sorted(self) -> None:
        proto = parse(LAYER, {"w": W})
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(proto.graph.node)]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        assert [n.name for n in trip(proto).graph.node] == ["mm", "act"]

    def test_cycle(self) -> None:
        proto = parse("g (float[4] x) => (float[4] y) { a = Add (x, y) y = Relu (a) }")
        with pytest.raises(GraphError, match="cycle"):
            Graph(open_model(proto)).to_model()

    def test_unread_weights_are_dropped(self) -> None:
        result = Graph(open_model(parse(LAYER, {"w": W, "other": W}))).to_model()
        assert list(result.weights) == ["w"]
        assert W.nbytes < result.nbytes < 2 * W.nbytes

    def test_long_chain_does_not_recurse(self) -> None:
        nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(5000)]
        proto = parse("g (float[4] t0) => (float[4] t5000) { t5000 = Relu (t0) }")
        del proto.graph.node[:]
        proto.graph.node.extend(reversed(nodes))
        assert [n.output[0] for n in Graph(open_model(proto)).to_model().proto.graph.node[:3]] == [
            "t1",
            "t2",
            "t3",
        ]


class TestEdits:
    def test_tensor_after_edits(self) -> None:
        graph = graph_of(LAYER, {"w": W})
        mm, act = graph.nodes
        a = graph.tensor("a")
        assert graph.producer(a) is mm
        assert graph.tensor("x") is mm.inputs[0]
        new = graph.variable("n")
        with pytest.raises(KeyError):
            graph.tensor("n")
        graph.add_node("Neg", "neg", [a], [new])
        assert graph.tensor("n") is new
        result = act.outputs[0]
        graph.remove(act)
        mm.outputs[0] = result
        assert graph.tensor("y") is result
        assert graph.producer(graph.tensor("y")) is mm
        with pytest.raises(KeyError):
            graph.tensor("a")
        with pytest.raises(KeyError):
            graph.node("act")
        assert [n.name for n in graph.nodes] == ["mm", "neg"]

    def test_new_node_never_inherits_from_a_removed_one(self) -> None:
        graph = graph_of(LAYER, {"w": W})
        result = graph.node("act").outputs[0]
        for i in range(20):
            graph.remove(graph.nodes[-1])
            graph.add_node("Elu", f"elu{i}", [graph.tensor("a")], [result], {"alpha": 0.5})
        node = graph.to_model().proto.graph.node[-1]
        assert (node.op_type, node.attribute[0].f) == ("Elu", 0.5)

    def test_consumers(self) -> None:
        graph = graph_of(
            "g (float[4] x) => (float[4] y, float[4] a) { [a] a = Mul (x, x) [b] b = Neg (a) "
            "[y] y = Add (b, b) }"
        )
        assert [n.name for n in graph.consumers(graph.tensor("x"))] == ["a"]
        assert graph.sole_consumer(graph.tensor("a")) is None  # a graph output
        assert graph.sole_consumer(graph.tensor("b")) is graph.node("y")
        assert graph.sole_consumer(graph.tensor("y")) is None

    def test_values(self) -> None:
        graph = graph_of("g (float[4] x) => (float[4] y) { [y] y = Add (x, k) }", {"k": np.float32(2)})
        x, k = graph.node("y").inputs
        assert graph.value(x) is None
        assert graph.value(None) is None
        assert graph.is_constant(k)
        assert graph.value(k) == np.float32(2)
        graph.set_value(k, np.float32(5))
        assert graph.value(k) == np.float32(5)
        assert run(graph.to_model(), {"x": np.zeros(4, np.float32)})[0].tolist() == [5, 5, 5, 5]

    def test_set_input_widens(self) -> None:
        graph = graph_of("g (float[4] x) => (float[4] y) { [c] y = Clip (x) }")
        graph.set_input(graph.node("c"), 2, graph.constant("hi", np.float32(0.5)))
        after = graph.to_model()
        assert list(after.proto.graph.node[0].input) == ["x", "", "hi"]
        assert run(after, {"x": np.full(4, 2, np.float32)})[0].tolist() == [0.5] * 4

    def test_set_attributes(self) -> None:
        proto = parse(
            "g (float[4] x) => (float[4] y) { [n] y = local.Any <a = 1, gone = 2.0, c = [1, 2]> (x) }"
        )
        proto.graph.node[0].attribute.append(helper.make_attribute("t", numpy_helper.from_array(W)))
        proto.graph.node[0].attribute.append(
            helper.make_attribute("e", [], attr_type=onnx.AttributeProto.INTS)
        )
        proto.graph.node[0].attribute[0].doc_string = "kept"
        graph = Graph(open_model(proto))
        node = graph.node("n")
        graph.set_attributes(
            node, {**{k: v for k, v in node.attrs.items() if k != "gone"}, "c": [3], "new": "s"}
        )
        after = {a.name: a for a in graph.to_model().proto.graph.node[0].attribute}
        assert set(after) == {"a", "c", "t", "e", "new"}
        assert after["a"].doc_string == "kept"
        assert list(after["c"].ints) == [3]
        assert after["t"].t == proto.graph.node[0].attribute[3].t

    def test_replace_everywhere(self) -> None:
        graph = graph_of("g (float[4] x) => (float[4] y) { [a] a = Neg (x) [y] y = Add (a, a) }")
        graph.replace_everywhere(graph.tensor("a"), graph.tensor("x"))
        graph.remove(graph.node("a"))
        assert list(graph.to_model().proto.graph.node[0].input) == ["x", "x"]


def test_graphsurgeon_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    trip(parse(LAYER, {"w": W}))
    captured = capfd.readouterr()
    assert re.sub(r"\s", "", captured.out + captured.err) == ""
