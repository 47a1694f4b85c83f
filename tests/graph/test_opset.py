"""Raising the opset: every common operator means the same afterwards, and nothing beside the operators changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.errors import GraphError
from calib.model import open_model
from calib.types import Array
from onnxslim_ptq.graph.graph import Graph
from onnxslim_ptq.graph.opset import raise_opset
from tests.graph.models import embedded, feed_for, parse, run

RNG = np.random.default_rng(0)
K = RNG.uniform(0.5, 2, 3).astype(np.float32)
WEIGHTS: dict[str, Array] = {
    "k": K,
    "w": RNG.standard_normal((5, 3, 3, 3), dtype=np.float32),
    "m": RNG.standard_normal((4, 6), dtype=np.float32),
    "s2": np.float32([1, 1, 2, 2]),
    "s15": np.float32([1, 1, 1.5, 2.5]),
    "half": np.float32([1, 1, 0.5, 0.5]),
    "i": np.array([1, 0]),
    "shape": np.array([2, -1]),
    "depth": np.array(4),
    "off_on": np.float32([0, 1]),
    "wt": RNG.standard_normal((3, 2, 3, 3), dtype=np.float32),
    "p1": np.float32(0.25).reshape(1),
    "w_rnn": RNG.standard_normal((1, 20, 4), dtype=np.float32),
    "r_rnn": RNG.standard_normal((1, 20, 5), dtype=np.float32),
    "g": RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32),
    "one": np.array([1]),
    "k3": np.array([3]),
}


BODIES = [
    (9, "g (float[2,6] x) => (float[2,2] v, int64[2,2] i) { v, i = TopK <axis = 1, k = 2> (x) }"),
    (10, "g (float[2,6] x, int64[1] k) => (float[2,N] v, int64[2,N] i) { v, i = TopK (x, k) }"),
    (9, "g (float[2,6] x) => (float[2,2] a, float[2,4] b) { a, b = Split <axis = 1, split = [2, 4]> (x) }"),
    (12, "g (float[2,6] x) => (float[2,3] a, float[2,3] b) { a, b = Split <axis = 1> (x) }"),
    (
        7,
        "g (float[3,2,4] x) => (float[3,1,2,5] y, float[1,2,5] h) { y, h = LSTM <hidden_size = 5> (x, w_rnn, r_rnn) }",
    ),
    (
        9,
        """g (float[2,6] x, bool c) => (float[2,6] y) { m = Identity (x)
        y = If (c) <then_branch = t () => (float[2,6] p) { q = Clip <min = 0.0, max = 0.5> (m) p = Softmax (q) },
                    else_branch = e () => (float[2,6] r) { r = Dropout (m) }> }""",
    ),
    (
        9,
        """g (float[6] x, int64 n) => (float[6] y, float[N,6] z) { yes = Constant <value = bool {1}> ()
        y, z = Loop (n, yes, x) <body = b (int64 i, bool go, float[6] v) => (bool on, float[6] w, float[6] o) {
          on = Identity (go) w = Clip <max = 0.5> (v)
          u = Unsqueeze <axes = [0]> (w) o = Squeeze <axes = [0]> (u) }> }""",
    ),
    (
        9,
        """g (float[2,6] x) => (float[2,6] y, float[2,6] z) {
        y = Clip <min = 0.0> (x) z = Clip <min = 0.0> (y) }""",
    ),
    (
        9,
        "g (float[2,N] _v_5) => (float[2,N] y) { _v_6 = Clip <min = 0.0, max = 9.0> (_v_5) y = Relu (_v_6) }",
    ),
    (9, "g (float[N,M] opset_0) => (float[N,M] y) { y = Clip <min = 0.0> (opset_0) }"),
    (11, "g (float[A,B,C] x) => (float[A,B,C] y) { a = Identity (x) y = Softmax <axis = 1> (a) }"),
]


@pytest.mark.parametrize(("opset", "body"), BODIES, ids=range(len(BODIES)))
def test_graphs_mean_the_same(opset: int, body: str) -> None:
    proto = parse(body, {k: WEIGHTS[k] for k in ("w_rnn", "r_rnn") if k in body}, opset)
    result = embedded(raise_opset(open_model(proto), 13))
    onnx.checker.check_model(result, full_check=True)
    for seed in range(3):
        feed = feed_for(proto, seed, {"A": 2, "B": 3, "C": 4})
        if "k" in feed:
            feed["k"] = np.array([2])
        for old, new in zip(run(proto, feed), run(result, feed), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


COMPUTED = """g (float[A,B,6] x) => (float[A,B,N,M] y) {
    s = Shape (x)  a = Slice (s, zero, two)  t = Concat <axis = 0> (a, rest)
    r = Reshape (x, t)  y = OP <axis = AXIS> (r) }"""


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("axis", "added"), [(3, 0), (-1, 0), (2, 3)])
def test_a_softmax_along_the_last_axis_stays_one_node(op: str, axis: int, added: int) -> None:
    """Behind a Reshape whose target is computed; along another axis it has to be flattened."""
    values = {"zero": np.array([0]), "two": np.array([2]), "rest": np.array([3, 2])}
    proto = parse(COMPUTED.replace("OP", op).replace("AXIS", str(axis)), values, 12)
    result = embedded(raise_opset(open_model(proto), 13))
    onnx.checker.check_model(result, full_check=True)
    assert len(result.graph.node) == len(proto.graph.node) + added
    feed = feed_for(proto, 0, {"A": 2, "B": 5})
    np.testing.assert_allclose(run(result, feed)[0], run(proto, feed)[0], rtol=1e-5, atol=1e-6)


class TestKept:
    def test_high_enough_is_the_same_object(self) -> None:
        model = open_model(parse("g (float[4] x) => (float[4] y) { y = Relu (x) }", opset=13))
        assert raise_opset(model, 13) is model
        assert raise_opset(model, 11) is model

    def source(self) -> onnx.ModelProto:
        body = """g (float[N,16] x) => (float[N,6] y) { [same] a = MatMul (x, w) [same] b = Clip <min = 0.0> (a)
            [] c = Add (b, tiny) [last] y = local.Any <e = 1> (c) }"""
        weights = {"w": RNG.standard_normal((16, 32), dtype=np.float32), "tiny": np.float32(1)}
        proto = parse(body, weights, opset=9)
        proto.doc_string, proto.producer_name, proto.domain = "doc", "maker", "org"
        proto.metadata_props.add(key="k", value="v")
        graph = proto.graph
        graph.doc_string = "graph doc"
        graph.metadata_props.add(key="gk", value="gv")
        for i, node in enumerate(graph.node):
            node.doc_string = f"doc {i}"
            node.metadata_props.add(key="scope", value=str(i))
        graph.input[0].doc_string = "input"
        graph.initializer[1].doc_string = "tiny"
        graph.value_info.append(helper.make_tensor_value_info("a", 1, ["N", 32]))
        any_node = graph.node[3]
        any_node.attribute[0].doc_string = "an attribute"
        any_node.attribute.append(helper.make_attribute("empty", [], attr_type=onnx.AttributeProto.INTS))
        any_node.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(1, [2])))
        any_node.attribute.append(helper.make_attribute("raw", numpy_helper.from_array(K)))
        any_node.attribute.append(helper.make_attribute("bytes", [b"\xff", b""]))
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, np.float32)),
            numpy_helper.from_array(np.zeros(1, np.int64)),
            [4],
        )
        any_node.attribute.append(helper.make_attribute("sparse", sparse))
        return proto

    def test_everything_but_what_has_to_change(self) -> None:
        proto = self.source()
        model = open_model(proto)
        before = model.proto.SerializeToString()
        raised = raise_opset(model, 13)
        assert model.proto.SerializeToString() == before
        expected = onnx.ModelProto.FromString(before)
        expected.opset_import[0].version = 13
        clip = expected.graph.node[1]
        del clip.attribute[:]
        clip.input.append("opset_0")
        added = raised.proto.graph.initializer[-1]
        assert numpy_helper.to_array(added) == 0
        expected.graph.initializer.append(added)
        attributes = [{a.name: a for a in p.graph.node[3].attribute} for p in (expected, raised.proto)]
        assert attributes[0] == attributes[1]
        for p in (expected, raised.proto):
            del p.graph.node[3].attribute[:]
        assert raised.proto == expected
        assert raised.weights.keys() == {"w"}
        assert raised.weights["w"] is model.weights["w"]

    def test_functions_are_inlined(self) -> None:
        proto = parse("g (float[2,6] x) => (float[2,6] y) { y = local.soft (x) }", opset=11)
        proto.functions.append(
            onnx.parser.parse_function(
                '<domain: "local", opset_import: ["" : 11]> soft (x) => (y) { a = Clip (x) y = Softmax (a) }'
            )
        )
        raised = raise_opset(open_model(proto), 13)
        assert [n.op_type for n in raised.proto.graph.node] == ["Clip", "Softmax"]
        feed = feed_for(proto)
        np.testing.assert_allclose(run(raised, feed)[0], run(proto, feed)[0], rtol=1e-6)

    def test_initializers_that_are_inputs(self) -> None:
        proto = parse(
            "g (float[2,16] x, float[16,32] w) => (float[2,32] y) { y = MatMul (x, w) }",
            {"w": np.ones((16, 32), np.float32)},
            opset=7,
            ir=3,
        )
        raised = raise_opset(open_model(proto), 13)
        assert [i.name for i in raised.proto.graph.input] == ["x", "w"]
        assert raised.proto.ir_version == 7
        feed = {"x": np.ones((2, 16), np.float32)}
        np.testing.assert_array_equal(run(raised, feed)[0], run(proto, feed)[0])

    def test_other_names_of_the_domain(self) -> None:
        proto = parse("g (float[4] x) => (float[4] y) { y = Clip <min = 0.0> (x) }", opset=9)
        proto.opset_import[0].domain = proto.graph.node[0].domain = "ai.onnx"
        raised = raise_opset(open_model(proto), 13)
        assert (raised.proto.opset_import[0].domain, raised.proto.opset_import[0].version) == ("ai.onnx", 13)
        assert raised.proto.graph.node[0].domain == "ai.onnx"
        assert run(raised, {"x": np.float32([-1, 2, 3, 4])})[0].tolist() == [0, 2, 3, 4]

    def test_sparse_initializer(self) -> None:
        proto = parse(
            "g (float[4] x) => (float[4] y) { a = Clip <min = 0.0> (x) y = Add (a, s) }", opset=9, ir=6
        )
        values = numpy_helper.from_array(np.ones(2, np.float32), "s")
        proto.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 3])), [4])
        )
        raised = raise_opset(open_model(proto), 13).proto
        assert raised.graph.sparse_initializer == proto.graph.sparse_initializer
        assert raised.graph.input == proto.graph.input

    def test_no_default_domain(self) -> None:
        proto = parse("g (float[4] x) => (float[4] y) { y = local.Any (x) }")
        del proto.opset_import[0]
        raised = raise_opset(open_model(proto), 13)
        assert [(o.domain, o.version) for o in raised.proto.opset_import] == [("local", 1), ("", 13)]

    def test_wrong_declared_shapes(self) -> None:
        proto = parse("g (float[N,6] x) => (float[N,7] y) { a = Clip (x) y = Softmax (a) }", opset=11)
        proto.graph.value_info.append(helper.make_tensor_value_info("a", 1, [1, 2, 3]))
        assert Graph(raise_opset(open_model(proto), 13)).opset == 13

    @pytest.mark.parametrize("dtype", ["bfloat16", "int4", "float8_e4m3fn"])
    def test_types(self, dtype: str) -> None:
        import ml_dtypes

        proto = parse("g (float[N] x) => (float[N] y) { c = local.Any (k) y = Relu (x) }", opset=11)
        values = (np.arange(2000) % 7).astype(np.float32).astype(getattr(ml_dtypes, dtype))
        proto.graph.initializer.append(numpy_helper.from_array(values, "k"))
        model = open_model(proto)
        assert raise_opset(model, 13).proto.graph.initializer[0] == model.proto.graph.initializer[0]


def test_refusal_names_the_operator_and_the_cure() -> None:
    proto = parse("g (float[2,6] x) => (float[2,6] y) { [n] y = Affine (x) }", opset=7)
    with pytest.raises(GraphError) as caught:
        raise_opset(open_model(proto), 13)
    assert "Affine" in str(caught.value)
    assert "export the model again with opset >= 13" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.network
@pytest.mark.parametrize("name", ["rec", "cls", "det"])
def test_real_models(name: str) -> None:
    from tools.zoo import ZooUnavailable, load

    try:
        case = load(name)
    except ZooUnavailable as error:
        pytest.skip(str(error))
    raised = embedded(raise_opset(open_model(case.model), 13))
    onnx.checker.check_model(raised)
    feed = case.evaluation[0]
    for old, new in zip(run(onnx.load(case.model), feed), run(raised, feed), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)
