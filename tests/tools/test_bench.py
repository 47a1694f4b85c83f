"""The benchmark's own arithmetic: tables, goals, sample subsets, results files. No model is run here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tools.bench.compare import Bench
from tools.bench.error import Noise, Paired
from tools.bench.goals import GOALS, judge
from tools.bench.records import OURS, PEER, Row, Table, read_results, write_results
from tools.bench.settings import MODELS, PEERS, peers_of
from tools.bench.spawn import JobError, Limits, run_job
from tools.bench.subset import pick, ragged
from tools.bench.tables import TITLE, markdown, refresh, replace_section, section
from tools.bench.timing import medians_ms

STAMP = {"machine": "a CPU", "versions": "some", "date": "2026-01-01", "command": "python -m tools.bench"}
GOOD = Row(OURS, "default", 2.5, 1.0, 200.0, 0.3, {"accuracy": 0.97}, 30.0, 0.8)


def table(*rows: Row, model: str = "cls") -> Table:
    return Table(model, 10.0, 100.0, 1.0, {"accuracy": 0.975}, STAMP, 2.0, list(rows))


def verdict(row: Row, goal: str, *peers: Row) -> bool | None:
    (found,) = [v for v in judge(table(row, *peers)) if v.goal.startswith(goal)]
    return found.kept


@pytest.mark.parametrize(
    ("changed", "goal", "kept"),
    [
        ({"quantize_s": 5.0}, "quantize time", True),
        ({"quantize_s": 5.1}, "quantize time", False),
        ({"quantize_s": None}, "quantize time", None),
        ({"peak_mb": 265.0}, "peak memory", True),
        ({"peak_mb": 265.1}, "peak memory", False),
        ({"metrics": {"accuracy": 0.97}}, "accuracy", True),
        ({"metrics": {"accuracy": 0.9699}}, "accuracy", False),
        ({"metrics": {}}, "accuracy", None),
        ({"sqnr": 29.0}, "SQNR", True),
        ({"sqnr": 28.9}, "SQNR", False),
    ],
)
def test_goals_are_bounds_on_our_row(changed: dict, goal: str, kept: bool | None) -> None:
    assert verdict(replace(GOOD, **changed), goal) is kept


def test_the_latency_goal_compares_only_with_results_as_accurate_as_ours() -> None:
    fast_and_wrong = Row(PEER, "a", sqnr=28.9, latency=0.1)
    slower = Row(PEER, "b", sqnr=29.0, latency=0.77)
    fast = Row(PEER, "c", sqnr=35.0, latency=0.75)
    broken = Row(PEER, "d", error="failed")
    assert verdict(GOOD, "latency", fast_and_wrong, slower, broken) is True
    assert verdict(GOOD, "latency", fast_and_wrong, slower, fast) is False
    assert verdict(GOOD, "latency", fast_and_wrong) is True
    assert verdict(GOOD, "latency") is None


def test_a_tool_that_failed_misses_and_a_tool_that_did_not_run_is_open() -> None:
    assert [v.kept for v in judge(table(Row(OURS, "default", error="died")))] == [False]
    assert [v.kept for v in judge(table())] == [None]


def test_a_result_that_the_tool_refuses_is_measured_and_misses(tmp_path: Path) -> None:
    class Refusing(Bench):
        def __init__(self) -> None:
            self.model, self.folder, self.table, self._files = "cls", tmp_path, table(), []

        def job(self, do: str, what: str, **arguments: Any) -> dict:
            if do == "quantize" and not arguments["setting"]["options"]:
                raise JobError("VerificationError: 4.1 dB")
            done = {"quantize_s": 1.0, "forward_s": 1.0, "peak_mb": 1.0, "size_mb": 1.0, "note": ""}
            return {**done, "metrics": {"accuracy": 0.975}, "sqnr": 4.1}

    bench = Refusing()
    bench.ours("w8a8", "default")
    (row,) = bench.table.rows
    assert (row.sqnr, row.error, row.refused) == (4.1, "", "VerificationError: 4.1 dB")
    assert judge(bench.table)[0].kept is False


def test_every_goal_names_a_model_that_is_measured_and_one_bound() -> None:
    assert {goal.model for goal in GOALS} <= set(MODELS)
    assert all((goal.at_least is None) != (goal.at_most is None) for goal in GOALS)
    assert peers_of("smollm2") == (PEERS[1],)


def test_subset_is_the_largest_group_of_one_shape_then_the_first() -> None:
    shapes = [[[1, 3, 8]], [[1, 3, 9]], [[1, 3, 9]], [[1, 3, 8]], [[1, 3, 9]]]
    assert pick(shapes) == [0, 1, 2, 3, 4]
    assert pick(shapes, same_shape=True) == [1, 2, 4]
    assert pick(shapes, same_shape=True, limit=2) == [1, 2]
    assert pick([]) == pick([], same_shape=True) == []
    assert ragged(shapes)
    assert not ragged([((1, 2),), [[1, 2]]])


@pytest.mark.parametrize(
    ("shapes", "memory", "tried"),
    [
        ([[[1]]] * 64, False, [{}]),
        ([[[1]]] * 64, True, [{}, *({"same_shape": False, "limit": n} for n in (32, 16, 8))]),
        ([[[1]]] * 40 + [[[2]]] * 24, False, [{}, {"same_shape": True}]),
    ],
)
def test_fewer_samples_are_tried_only_where_they_help(shapes: list, memory: bool, tried: list) -> None:
    class Failing(Bench):
        def __init__(self) -> None:
            self.model, self.shapes, self.seen = "m", shapes, []

        def job(self, do: str, what: str, **arguments: object) -> dict:
            self.seen.append(arguments)
            raise JobError("no", memory=memory)

    bench = Failing()
    with pytest.raises(JobError, match="no"):
        bench._quantized(bench._attempts(), "x", {})
    assert bench.seen == tried


def test_tables_show_what_was_measured_and_what_failed() -> None:
    text = section("main", {"cls": table(GOOD, Row(PEER, "per|channel", error="it\ndied"))})
    assert "| **onnxslim_ptq: default** | 2.5 | 2.5 | 200 ok | 0.30 | 0.9700 | 30.0 | 0.80 |" in text
    assert "| quantize_static: per\\|channel **failed:** it died | – | – | – | – | – | – | – |" in text
    assert "5 of 5 kept" in section("main", {"cls": table(GOOD, Row(PEER, "b", sqnr=20.0, latency=0.1))})
    assert "| `default` | 30.0 | 0.9700 | 2.5 |" in section("ranges", {"cls": table(GOOD)})
    assert text.count("2026-01-01") == 1


def test_markdown_has_one_line_per_row() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


def test_sections_are_refreshed_alone_and_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "b.md"
    refresh(file, "ranges", "old ranges")
    refresh(file, "main", "first")
    refresh(file, "ranges", "new ranges")
    text = file.read_text("utf-8")
    assert text.startswith(TITLE)
    assert text.index("first") < text.index("new ranges")
    assert "old" not in text
    assert replace_section(text, "main", "first") == text


def test_results_file_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert read_results(file) == read_results(None) == {}
    results = {"main": {"cls": table(GOOD, Row(PEER, "a", error="x"))}}
    write_results(file, results)
    assert read_results(file) == results
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_noise_is_pooled_and_the_worst_float_output_counts() -> None:
    noise = Noise(["a", "b", "index"])
    ones, whole = np.ones((1, 4), np.float32), np.arange(3)
    noise.add([ones, ones, whole], [ones * 0.9, ones, whole + 1])
    noise.add([ones * 3, ones, whole], [ones * 3, ones, whole])
    assert noise.worst() == pytest.approx(10 * math.log10(40 / 0.04), abs=1e-3)
    with pytest.raises(ValueError, match="'a' has shape"):
        noise.add([ones, ones, whole], [ones[:, :2], ones, whole])
    with pytest.raises(ValueError, match="'b' has NaN"):
        noise.add([ones, ones, whole], [ones, ones * np.nan, whole])


def test_paired_losses() -> None:
    paired, draw = Paired(), np.random.default_rng(0)
    assert paired.metrics() == {}
    growths = draw.normal(0.1, 1, 50)
    for part in np.split(growths, 5):
        paired.add(part)
    found = paired.metrics()
    assert found["loss_growth"] == pytest.approx(growths.mean())
    assert found["loss_growth_error"] == pytest.approx(np.sqrt(growths.var(ddof=1) / 50))


def test_the_quality_table_compares_with_the_default() -> None:
    grown = {"accuracy": 0.9, "loss_growth": 0.02, "loss_growth_error": 0.004}
    rows = [replace(GOOD, setting="w8a8"), replace(GOOD, setting="w8a16", latency=0.4, metrics=grown)]
    text = section("quality", {"cls": table(*rows)})
    assert "| `w8a16` | 30.0 | 0.9000 | 1.0202 | 0.0200 ± 0.0040 | 0.30 | 0.40 | 0.50 | 200 | 2.5 |" in text
    assert "| `w8a8` | 30.0 | 0.9700 | – | – | 0.30 | 0.80 | 1.00 |" in text


def test_the_outliers_table_judges_each_recipe() -> None:
    figures = {"plain": (32.0, 12.0), "m4": (31.0, 30.6), "m6": (31.0, 29.9), "smoothquant": (17.9, 17.8)}
    rows = [Row(OURS, n, metrics={"untouched": a, "outliers": b}) for n, (a, b) in figures.items()]
    text = section("outliers", {"cls": table(*rows)})
    assert "| `plain` | 32.0 | 12.0 | 20.0 | – | – |" in text
    assert "| `m4` | 31.0 | 30.6 | 0.4 | 18.6 | ok |" in text
    assert "| `m6` | 31.0 | 29.9 | 1.1 | 17.9 | **missed** |" in text
    assert "| `smoothquant` | 17.9 | 17.8 | 0.1 | 5.8 | **missed** |" in text


def test_sessions_take_turns() -> None:
    order: list[str] = []

    class Session:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, outputs: None, feed: dict) -> None:
            sum(range(20000))
            if not order or order[-1] != self.name:
                order.append(self.name)

    times = medians_ms([Session("a"), Session("b")], {}, rounds=3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert len(times) == 2
    assert all(time > 0 for time in times)


def test_constants_become_initializers() -> None:
    from tools.bench.peer import lift_constants

    tensor = onnx.numpy_helper.from_array(np.ones(2, np.float32), "inner")
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=tensor),
        onnx.helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:]))
    lift_constants(proto)
    assert [node.op_type for node in proto.graph.node] == ["Add"]
    assert [value.name for value in proto.graph.initializer] == ["c"]
    onnx.checker.check_model(proto)


def test_a_job_that_fails_or_takes_too_long_is_one_line() -> None:
    with pytest.raises(JobError, match=r"^ValueError: no zoo case 'nothing'"):
        run_job({"do": "float", "model": "nothing"}, Limits(4096, 60))
    with pytest.raises(JobError, match="stopped after 0 s"):
        run_job({"do": "float", "model": "nothing"}, Limits(4096, 0))


def test_the_calib_table_names_its_models(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.bench import calib

    with pytest.raises(SystemExit) as stopped:
        calib.main(["--models", "cls"])
    assert stopped.value.code == 2
    assert "no sweep of 'cls'" in capsys.readouterr().err
