"""`stream-rl bench report`: one page of whatever is there, with nothing of it taken for markup."""

import json
import pathlib
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from test_bench_loop import modes

from scripts.bench import loop_figures
from scripts.bench.cli import bench
from scripts.bench.engine import Burst, figures
from scripts.bench.report import headlines, page, read
from stream_rl.errors import ConfigError
from stream_rl.metrics import finite

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    here = tmp_path / "results"
    here.mkdir()
    measured = modes(tmp_path) | {"rounds": {"steps": 0, "error": "no step was taken"}}
    loop = {
        "bench": "loop",
        "device": "<b>GPU</b>",
        "gpus": 2,
        "modes": measured,
        "targets": {},
        "includes": {"G": "&"},
    }
    rounds = [{"plain": Burst(1.0, 100), "plugin": Burst(1.0 + i / 100, 100)} for i in range(3)]
    engine = {"bench": "engine", "device": "GPU", "targets": {"plugin": 0.98}, **figures(rounds)}
    loop |= loop_figures.compared(measured, None)
    for name, value in (("loop", loop), ("engine", engine), ("other", {"bench": "other", "a": {"b": 1.5}, "c": "x"})):
        (here / f"{name}.json").write_text(json.dumps(finite(value)))
    return here


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "svg"
        self.outside += [v or "" for k, v in attrs if k in ("src", "href") and (v or "").startswith(("http", "/"))]


def test_the_page_has_tables_and_pictures_and_needs_nothing_else(folder: pathlib.Path) -> None:
    text = page(read(folder))
    parsed = Page()
    parsed.feed(text)
    assert parsed.pictures == 5 and parsed.outside == []
    assert "&lt;b&gt;GPU&lt;/b&gt;" in text and "<b>GPU</b>" not in text
    assert ">1.5<" in text and "over_synchronous" in text


def test_headlines_say_what_was_measured_and_leave_out_the_rest(folder: pathlib.Path) -> None:
    rows = {what: value for what, value, _ in headlines(read(folder))}
    assert rows["... over synchronous on the same GPUs"] == "3.00 x"
    assert rows["engine throughput, plugin, over plain SGLang"].startswith("0.990 (")
    assert not any("colocated" in what for what in rows)


def test_headlines_of_single_parts_say_of_what_and_how_sure() -> None:
    ratio = {"mean": 0.99, "low": 0.96, "high": 1.02}
    results = {
        "a": {"bench": "updates", "tp": 2, "throughput_ratio": ratio, "few": {"stall_ms": {"p99": None}}},
        "b": {"bench": "endpoint", "rate_ratio": ratio, "device": "GPU"},
        "c": {"bench": "updates", "tp": 1, "throughput_ratio": None},
    }
    assert headlines(results) == [
        ("engine throughput with two versions a second, tp 2", "0.990 (0.960 to 1.020)", "a:"),
        ("engine throughput through the endpoint for agents", "0.990 (0.960 to 1.020)", "b: GPU"),
    ]


def test_every_result_of_ours_gives_a_page(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(bench, ["report", str(ROOT / "benchmarks"), "--html", str(out)])
    assert result.exit_code == 0, result.output
    for path in (ROOT / "benchmarks").glob("*.json"):
        assert f"id='{path.stem}'" in out.read_text()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_what_is_no_result_is_named(text: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="no results"):
        read(tmp_path)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        read(tmp_path)


def test_a_curve_says_what_its_time_is_counted_from() -> None:
    committed = read(ROOT / "benchmarks")
    label = "seconds since {}".format
    assert label("the command was typed") in page({"smollm2_h200": committed["smollm2_h200"]})
    assert label("rollouts began") in page({"loop_h200x2": committed["loop_h200x2"]})
