"""The graph view: what goes in comes out, whatever graphsurgeon cannot hold, and edits keep every index right."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.errors import GraphError
from calib.model import open_model
from onnxslim_ptq.graph.graph import Graph
from tests.graph.models import embedded, graph_of, model_of, parse, run, same_outputs

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
        body = "g (float[N,16] x) => (float[N,16] y) { y = local.Any <a = 1, b = 2.5, c = \"text\", d = [1, 2]> (x) }"
        proto = parse(body)
        node = proto.graph.node[0]
        node.attribute.append(helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS))
        node.attribute.append(helper.make_attribute("words", [b"\xff\x00", b""]))
        node.attribute.append(helper.make_attribute("t", numpy_helper.from_array(W)))
        node.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(1, [2])))
        sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.ones(1, np.float32)),
                                           numpy_helper.from_array(np.zeros(1, np.int64)), [4])
        node.attribute.append(helper.make_attribute("sparse", sparse))
        node.overload = "second"
        after = Graph(open_model(proto)).to_model().proto
        node.name = after.graph.node[0].name
        assert after.graph.node[0] == node

    def test_functions(self) -> None:
        proto = parse("g (float[N,16] x) => (float[N,16] y) { y = local.twice <k = 2.0> (x) }")
        body = onnx.parser.parse_function(
            '<domain: "local", opset_import: ["" : 17]> twice <k> (x) => (y) '
            "{ c = Constant <value_float: float = @k> () y = Mul (x, c) }")
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
            helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 3])), [4]))
        after = Graph(open_model(proto)).to_model().proto
        assert after.graph.sparse_initializer == proto.graph.sparse_initializer
        assert list(after.graph.node[0].input) == ["x", "s"]

    @pytest.mark.parametrize("dtype", ["int4", "bfloat16", "float8_e4m3fn"])
    def test_types_numpy_lacks(self, dtype: str) -> None:
        import ml_dtypes

        values = (np.arange(4000) % 8).astype(np.float32).astype(getattr(ml_dtypes, dtype))
        proto = parse("g (float[1] x) => (float[N] y) { c = Cast <to = 1> (w) y = Add (c, x) }", opset=21, ir=10)
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
        model = open_model(parse("g (float[N,16] x, float[16,32] w) => (float[N,32] y) { y = MatMul (x, w) }", {"w": W}))
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
    WEIGHTS = {"k": np.float32(1), "shared": np.float32([1, 2, 3, 4]), "deep": np.float32(3), "unused": np.float32(5)}

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
          [loop] y, z = Loop (n, yes, x) <body = b (int64 i, bool cond, float[4] v) => (bool go, float[4] w, float[4] o) {
            go = Identity (cond)  w = Mul (v, k)  o = Add (w, x) }>
          [scan] f, s = Scan <num_scan_inputs = 1, body = sb (float[4] acc, float[4] row) => (float[4] nacc, float[4] r) {
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


class TestNames:
    def test_unnamed_and_duplicate_nodes(self) -> None:
        body = "g (float[4] x) => (float[4] y) " \
               "{ a = Relu (x) [n] b = Relu (a) [n] c = Neg (b) [Relu_a] d = Abs (c) y = Exp (d) }"
        proto = parse(body)
        proto.graph.node[4].name = "n#2"
        graph = Graph(open_model(proto))
        assert [n.name for n in graph.nodes] == ["Relu_a#2", "n", "n#3", "Relu_a", "n#2"]
        assert [n.name for n in Graph(graph.to_model()).nodes] == [n.name for n in graph.nodes]
        run(graph.to_model(), {"x": np.ones(4, np.float32)})  # the source does not load: ONNX Runtime wants unique names

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
        proto = parse("g (float[N,16] x, float[16,32] w) => (float[N,32] y) { y = MatMul (x, w) }", {"w": W}, ir=3)
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
        body = "g (float[4] x) => (float[16,32] w, float[2] k, float[4] y) " \
               "{ k = Constant <value = float[2] {1, 2}> () y = Relu (x) }"
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
        assert [n.output[0] for n in Graph(open_model(proto)).to_model().proto.graph.node[:3]] == ["t1", "t2", "t3"]


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
        graph = graph_of("g (float[4] x) => (float[4] y, float[4] a) { [a] a = Mul (x, x) [b] b = Neg (a) "
                         "[y] y = Add (b, b) }")
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
        proto = parse("g (float[4] x) => (float[4] y) { [n] y = local.Any <a = 1, gone = 2.0, c = [1, 2]> (x) }")
        proto.graph.node[0].attribute.append(helper.make_attribute("t", numpy_helper.from_array(W)))
        proto.graph.node[0].attribute.append(helper.make_attribute("e", [], attr_type=onnx.AttributeProto.INTS))
        proto.graph.node[0].attribute[0].doc_string = "kept"
        graph = Graph(open_model(proto))
        node = graph.node("n")
        graph.set_attributes(node, {**{k: v for k, v in node.attrs.items() if k != "gone"}, "c": [3], "new": "s"})
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


REAL: list[str] = ["rec", "cls", "det", "silero", "silero-16k-op15", "silero-half", "silero-op18-ifless",
                   "silero-16k-sequence", "basic-pitch", "voicefilter-int8"]


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
