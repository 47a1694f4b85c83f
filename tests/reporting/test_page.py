"""The report in a real browser: it renders, sorts, filters, opens details, loads nothing, and runs no name as code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calib.readers import open_data
from onnxslim_ptq import quantize
from onnxslim_ptq.analysis.compare import compare_models
from onnxslim_ptq.cli import main
from onnxslim_ptq.commands.samples import Again
from onnxslim_ptq.reporting import gather_facts, render_page, write_report

DIGITS = Path(__file__).resolve().parents[2] / "tools" / "digits"
HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>&amp;'
)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    service = shutil.which("chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if browser is None or service is None:
        pytest.skip("no Chromium with chromedriver here (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1400"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "r.html"
    arguments = [str(DIGITS / "digits.onnx"), str(folder / "m.onnx"), "--calib", str(DIGITS / "calib")]
    assert main([*arguments, "--exclude", "*stem*", "--report", str(path), "-q"]) == 0
    return path


def names(driver: Any) -> list[str]:
    return [cell.text for cell in driver.find_elements("css selector", "#layers tbody tr.layer td.name")]


def errors(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def facts_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    facts: dict[str, Any] = json.loads(found[1])
    return facts


def many(count: int) -> dict[str, Any]:
    """Facts of a model of that many layers, with a hostile name in every field that comes from a model."""
    layer = {
        "op": "MatMul",
        "state": "int8",
        "why": "",
        "input": {"tensor": HOSTILE, "lo": -1.0, "hi": 2.0, "bars": [123456] * 48, "clip": [-0.9, 1.9],
                  "dtype": "uint8", "method": "mse", "saturated": 0.01},
        "weights": {"channels": 512, "largest": [0.1234] * 64, "dead": 1},
        "smoothing": {"before": [1.234] * 64, "after": [1.234] * 64},
    }  # fmt: skip
    rows = [
        {"node": f"{HOSTILE}{i}", "local": float(i % 50), "cumulative": 12.5, **layer} for i in range(count)
    ]
    metrics = {"sqnr_db": 30.0, "cosine": 0.999, "top1_agree": 0.99, "samples": 8, "measured_on": "held-out"}
    return {
        "title": HOSTILE, "target": "cpu", "quant_type": "W8A8", "bytes": [1000, 300], "metrics": metrics,
        "outputs": [{"name": HOSTILE, "sqnr_db": 30.0, "cosine": None, "max_abs_error": 0.1, "top1_agree": None}],
        "latency": None, "task": {HOSTILE: [0.9, 0.89]}, "layers": rows,
        "islands": [{"node": HOSTILE, "op": HOSTILE, "reason": HOSTILE}], "unfused": [HOSTILE],
        "health": {"tensors": 1, "lines": [{"tensor": HOSTILE, "nan": 1, "inf": 0, "dead": 0, "channels": 4}]},
        "notes": [HOSTILE], "recipe": HOSTILE, "manifest": {"x": HOSTILE}, "next": HOSTILE,
    }  # fmt: skip


class TestPage:
    def test_it_renders(self, driver: Any, report: Path) -> None:
        driver.get(report.as_uri())
        assert "W8A8 for cpu" in driver.title
        cards = driver.find_element("id", "summary").text
        for word in ("SQNR of the worst output", "Size", "Latency", "Layers in int8"):
            assert word in cards
        assert len(names(driver)) == 10
        assert "excluded by pattern '*stem*'" in driver.find_element("id", "layers").text
        assert "HardSigmoid" in driver.find_element("id", "islands").text
        assert "type: quantize" in driver.find_element("id", "recipe").text
        assert errors(driver) == []

    def test_it_sorts_and_filters(self, driver: Any, report: Path) -> None:
        driver.get(report.as_uri())
        by_error = names(driver)
        head = driver.find_element("css selector", "th[data-key=node] button")
        head.click()
        assert names(driver) == sorted(by_error, key=str.lower)
        head.click()
        assert names(driver) == sorted(by_error, key=str.lower, reverse=True)
        driver.find_element("id", "filter").send_keys("block1")
        assert len(names(driver)) == 3
        assert driver.find_element("id", "count").text == "3 of 10"
        assert errors(driver) == []

    def test_details_open_by_keyboard(self, driver: Any, report: Path) -> None:
        from selenium.webdriver.common.keys import Keys

        driver.get(report.as_uri())
        driver.find_element("css selector", "body").send_keys("/")
        assert driver.switch_to.active_element.get_attribute("id") == "filter"
        driver.switch_to.active_element.send_keys("fc/Gemm")
        driver.find_element("css selector", "#layers tbody tr.layer button").send_keys(Keys.ENTER)
        opened = driver.find_element("css selector", "tr.details")
        assert "dashed lines the chosen range" in opened.text
        assert len(opened.find_elements("css selector", "svg")) >= 2
        assert driver.find_element("css selector", "[aria-expanded=true]")

    def test_light_and_dark(self, driver: Any, report: Path) -> None:
        driver.get(report.as_uri())
        body = driver.find_element("css selector", "body")
        before = body.value_of_css_property("background-color")
        driver.find_element("id", "theme").click()
        assert body.value_of_css_property("background-color") != before

    def test_it_prints(self, driver: Any, report: Path) -> None:
        driver.get(report.as_uri())
        assert len(driver.print_page()) > 1000

    def test_five_hundred_hostile_layers(self, driver: Any, tmp_path: Path) -> None:
        path = tmp_path / "big.html"
        write_report(many(500), path)
        assert path.stat().st_size < 2_000_000
        driver.get(path.as_uri())
        assert driver.title.startswith("</script>")
        assert len(names(driver)) == 500
        driver.find_element("css selector", "#layers tbody tr.layer button").click()
        assert driver.find_elements("css selector", "img") == []
        assert errors(driver) == []


class TestText:
    def test_nothing_closes_the_block_of_data(self) -> None:
        page = render_page(many(2))
        assert "owned</script>" not in page
        assert page.count("</script>") == 2
        assert facts_of(page)["title"] == HOSTILE

    def test_no_address_and_no_nan(self) -> None:
        facts = many(1)
        facts["metrics"]["sqnr_db"] = float("nan")
        page = render_page(facts)
        assert "NaN," not in page.split("</script>")[0]
        assert not re.search(r"""(?:src|href)=["'](?!data:)""", page.split('id="data">')[0])

    def test_what_the_command_gathers(self, report: Path) -> None:
        facts = facts_of(report.read_text("utf-8"))
        rows = {row["node"]: row for row in facts["layers"]}
        row = rows["/fc/Gemm"]
        assert row["input"]["clip"][0] <= row["input"]["lo"] + 0.1
        assert sum(row["input"]["bars"]) > 0
        assert 0 <= row["input"]["saturated"] < 0.05
        assert row["weights"]["channels"] == 10
        assert rows["/stem/stem.0/Conv"]["state"] == "float"
        assert " tune " in facts["next"]
        assert report.stat().st_mode & 0o077 == 0o040


def test_it_replaces_nothing_but_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before the work, not after it: a name that could be a model's, and a folder."""
    model = tmp_path / "m.onnx"
    model.write_bytes((DIGITS / "digits.onnx").read_bytes())
    (tmp_path / "page.html").mkdir()
    start = [str(model), str(tmp_path / "o.onnx"), "--calib", str(DIGITS / "calib"), "--report"]
    assert main([*start, str(model)]) == 2
    assert "give a name that ends in .html" in capsys.readouterr().err
    assert main([*start, str(tmp_path / "page.html")]) == 2
    assert "cannot be written; choose a file" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "page.html"]


def test_an_exact_result_is_not_unknown() -> None:
    """Infinite decibels: JSON has none, and null is shown as n/a."""
    result = quantize(DIGITS / "digits.onnx", calib_data=DIGITS / "calib")
    samples = list(open_data([DIGITS / "calib"], result.source.inputs()))[:1]
    same = compare_models(result.source, result.source, samples, latency=False)
    result.metrics["sqnr_db"] = float("inf")
    facts = facts_of(render_page(gather_facts(result, same, samples, nbytes=(2, 1))))
    assert facts["metrics"]["sqnr_db"] == 999.0
    assert {output["sqnr_db"] for output in facts["outputs"]} == {999.0}


def test_the_suggested_commands_use_the_same_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out, calib = tmp_path / "p.html", tmp_path / "o.onnx", str(DIGITS / "calib")
    command = [str(DIGITS / "digits.onnx"), str(out), "--calib", calib, "--report", str(page)]
    assert main([*command, "--samples", "40", "--reduce-range", "on"]) == 0
    again = f"{DIGITS / 'digits.onnx'} {out} --calib {calib} --samples 40"
    assert f"next: onnxslim-ptq compare {again}  (error" in capsys.readouterr().out
    suggested = facts_of(page.read_text())["next"]
    assert suggested.startswith(f"onnxslim-ptq tune {again} --reduce-range on --goal")
    assert main([*command, "--eval", str(DIGITS / "calib" / "000.npz"), "-q"]) == 0
    assert (
        f"--calib {calib} --eval {DIGITS / 'calib' / '000.npz'} --goal" in facts_of(page.read_text())["next"]
    )


def test_the_suggested_command_makes_the_same_kind_of_result() -> None:
    given = {"recipe": "w8a8-minmax", "preprocess": None, "tokenizer": None, "target": "generic"}
    assert Again.of(given) == Again("", " --recipe w8a8-minmax --target generic")
    assert Again.of({**given, "recipe": "w8a8", "target": None, "preprocess": "coco"}) == Again(
        " --preprocess coco", " --preprocess coco"
    )
