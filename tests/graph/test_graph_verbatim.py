"""Round trips through the graph view: attributes, metadata, functions and subgraphs come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

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


class TestVerbatim:
    def test_everything_but_edits_returns(self) -> None:
        proto = parse(LAYER, {"w": W})
        proto.producer_name, proto.producer_version, proto.domain = "maker", "1.2", "org.maker"
        proto.model_version, proto.doc_string = 7, "what it is"
        proto.metadata_props.add(key="labels", value="a\nb")
        graph = proto.graph
        graph.doc_string = "graph text"
        graph.metadata_props.add(key="gk", value="gv")
        graph.node[0].doc_string = "node text"
        graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layer']")
        graph.value_info.append(helper.make_tensor_value_info("a", 1, ["N", 32]))
        note = graph.quantization_annotation.add(tensor_name="a")
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
        graph.input[0].doc_string = "the input"
        graph.initializer[0].doc_string = "the weight"
        proto.ir_version = 10
        after = embedded(Graph(open_model(proto)).to_model())
        after.graph.initializer[0].doc_string = "the weight"  # lost by ``embedded``, not by Graph
        assert after == proto

    def test_attributes(self) -> None:
        body = 'g (float[N,16] x) => (float[N,16] y) { y = local.Any <a = 1, b = 2.5, c = "text", d = [1, 2]> (x) }'
        proto = parse(body)
        node = proto.graph.node[0]
        node.attribute.append(helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS))
        node.attribute.append(helper.make_attribute("words", [b"\xff\x00", b""]))
        node.attribute.append(helper.make_attribute("t", numpy_helper.from_array(W)))
        node.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(1, [2])))
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, np.float32)),
            numpy_helper.from_array(np.zeros(1, np.int64)),
            [4],
        )
        node.attribute.append(helper.make_attribute("sparse", sparse))
        node.overload = "second"
        after = Graph(open_model(proto)).to_model().proto
        node.name = after.graph.node[0].name
        assert after.graph.node[0] == node

    def test_functions(self) -> None:
        proto = parse("g (float[N,16] x) => (float[N,16] y) { y = local.twice <k = 2.0> (x) }")
        body = onnx.parser.parse_function(
            '<domain: "local", opset_import: ["" : 17]> twice <k> (x) => (y) '
            "{ c = Constant <value_float: float = @k> () y = Mul (x, c) }"
        )
        proto.functions.append(body)
        after = trip(proto)
        assert after.functions == proto.functions
        same_outputs(proto, after)

    def test_reference_attributes_stay_references(self) -> None:
        proto = parse("g (float[N,16] x) => (float[N,16] y) { y = LeakyRelu (x) }")
        proto.graph.node[0].attribute.add(name="alpha", ref_attr_name="a", type=onnx.AttributeProto.FLOAT)
        after = Graph(open_model(proto)).to_model().proto
        assert after.graph.node[0].attribute[0].ref_attr_name == "a"

    def test_sparse_initializer(self) -> None:
        proto = parse("g (float[N,4] x) => (float[N,4] y) { y = Add (x, s) }", ir=11)
        values = numpy_helper.from_array(np.ones(2, np.float32), "s")
        proto.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 3])), [4])
        )
        after = Graph(open_model(proto)).to_model().proto
        assert after.graph.sparse_initializer == proto.graph.sparse_initializer
        assert list(after.graph.node[0].input) == ["x", "s"]

    @pytest.mark.parametrize("dtype", ["int4", "bfloat16", "float8_e4m3fn"])
    def test_types_numpy_lacks(self, dtype: str) -> None:
        import ml_dtypes

        values = (np.arange(4000) % 8).astype(np.float32).astype(getattr(ml_dtypes, dtype))
        proto = parse(
            "g (float[1] x) => (float[N] y) { c = Cast <to = 1> (w) y = Add (c, x) }", opset=21, ir=10
        )
        proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
        after = Graph(open_model(proto)).to_model()
        assert after.proto.graph.initializer[0] == proto.graph.initializer[0]
        graph = Graph(open_model(proto))
        value = graph.value(graph.nodes[0].inputs[0])
        assert value is not None
        assert value.dtype == values.dtype
        new = graph.constant("new", values)
        graph.set_input(graph.nodes[0], 0, new)
        made = graph.to_model()
        assert made.weights == {}
        np.testing.assert_array_equal(numpy_helper.to_array(made.proto.graph.initializer[0]), values)

    def test_source_is_not_changed(self) -> None:
        model = open_model(
            parse("g (float[N,16] x, float[16,32] w) => (float[N,32] y) { y = MatMul (x, w) }", {"w": W})
        )
        before = model.proto.SerializeToString()
        graph = Graph(model)
        graph.remove(graph.nodes[0])
        graph.to_model()
        assert model.proto.SerializeToString() == before


class TestSubgraphs:
    IF = """
    g (bool c, float[4] x) => (float[4] y) {
      [late] late = Add (x, k)
      [if] y = If (c) <
        then_branch = t () => (float[4] a) { a = Add (late, shared) },
        else_branch = e () => (float[4] b) { n = Not (c)
          b = If (n) <then_branch = t2 () => (float[4] a2) { a2 = Mul (x, deep) },
                      else_branch = e2 () => (float[4] b2) { b2 = Identity (x) }> }>
    }"""
    WEIGHTS: ClassVar = {
        "k": np.float32(1),
        "shared": np.float32([1, 2, 3, 4]),
        "deep": np.float32(3),
        "unused": np.float32(5),
    }

    def test_if_keeps_captured_values(self) -> None:
        proto = parse(self.IF, self.WEIGHTS)
        after = trip(proto)
        assert {t.name for t in after.graph.initializer} == {"k", "shared", "deep"}
        assert after.graph.node[1].attribute == proto.graph.node[1].attribute
        assert list(after.graph.node[1].input) == ["c"]
        for c in (True, False):
            same_outputs(proto, after, feeds=[{"c": np.array(c), "x": np.float32([1, -2, 3, -4])}])

    def test_producer_of_a_captured_value_comes_first(self) -> None:
        graph = graph_of(self.IF, self.WEIGHTS)
        late = graph.node("late")
        assert [n.name for n in graph.consumers(late.outputs[0])] == ["if"]
        result, new = late.outputs[0], graph.variable("new")
        late.outputs[0] = new
        graph.add_node("Neg", "last", [new], [result])  # added at the end, read by the If
        assert [n.name for n in graph.to_model().proto.graph.node] == ["late", "last", "if"]

    def test_captured_value_cannot_be_replaced(self) -> None:
        graph = graph_of(self.IF, self.WEIGHTS)
        with pytest.raises(ValueError, match="'late' is read by name"):
            graph.replace_everywhere(graph.tensor("late"), graph.tensor("x"))
        with pytest.raises(ValueError, match="captured"):
            graph.set_input(graph.node("if"), 7, graph.tensor("x"))

    def test_own_input_of_a_node_with_subgraphs_can_be_replaced(self) -> None:
        body = """g (bool c, bool d, float[4] x) => (float[4] y) {
          [if] y = If (c) <then_branch = t () => (float[4] a) { a = Neg (x) },
                           else_branch = e () => (float[4] b) { b = Identity (x) }> }"""
        graph = graph_of(body)
        graph.replace_everywhere(graph.tensor("c"), graph.tensor("d"))
        assert list(graph.to_model().proto.graph.node[0].input) == ["d"]

    def test_loop_and_scan(self) -> None:
        body = """
        g (float[4] x, int64 n) => (float[4] y, float[3,4] z, float[3,4] s) {
          yes = Constant <value = bool {1}> ()
          [loop] y, z = Loop (n, yes, x) <body = b (int64 i, bool c, float[4] v) => (bool go, float[4] w, float[4] o) {
            go = Identity (c)  w = Mul (v, k)  o = Add (w, x) }>
          [scan] f, s = Scan <num_scan_inputs = 1, body = sb (float[4] acc, float[4] row) =>
            (float[4] nacc, float[4] r) {
            nacc = Add (acc, row)  r = Mul (nacc, k) }> (x, z)
        }"""
        proto = parse(body, {"k": np.float32(0.5)})
        after = trip(proto)
        same_outputs(proto, after, feeds=[{"x": np.float32([1, 2, 3, 4]), "n": np.array(3)}])
        assert {t.name for t in after.graph.initializer} == {"yes", "k"}

    def test_new_names_avoid_those_inside(self) -> None:
        graph = graph_of(self.IF, self.WEIGHTS)
        assert graph.variable("b2").name == "b2_1"
        assert graph.constant("deep", np.float32(1)).name == "deep_1"
        assert graph.has_subgraph(graph.node("if"))
        assert not graph.has_subgraph(graph.node("late"))


REAL: list[str] = [
    "rec",
    "cls",
    "det",
    "silero",
    "silero-16k-op15",
    "silero-half",
    "silero-op18-ifless",
    "silero-16k-sequence",
    "basic-pitch",
    "voicefilter-int8",
]


@pytest.mark.network
@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    from tools.zoo import ZooUnavailable, load

    try:
        case = load(name)
    except ZooUnavailable as error:
        pytest.skip(str(error))
    model = open_model(case.model)
    after: Callable[[], onnx.ModelProto] = lambda: embedded(Graph(model).to_model())  # noqa: E731
    feed = case.evaluation[0]
    for old, new in zip(run(onnx.load(case.model), feed), run(after(), feed), strict=True):
        np.testing.assert_array_equal(old, new)
