"""`stream-rl bench report`: every result in a folder on one page that needs nothing else, and the headline rows.

A result is a JSON object with the key `bench`.  Those of `learned`, `loop` and `engine` have pictures; of any other the
numbers are listed as they are.
"""

import html
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from stream_rl.errors import ConfigError
from stream_rl.metrics import flatten

MOST_ROWS = 60
"""Numbers of a result that are listed."""
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>stream_rl: what was measured</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .8rem 0 } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums } svg { max-width: 100% }
.met { color: #176b2c } .missed { color: #a11 } .note { color: #666; font-size: 13px }
</style>"""
Rows = Sequence[Sequence[object]]


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Results by file name.  Raises ConfigError for a file that is no JSON object, or if there is none."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must hold one JSON object, got a {type(value).__name__}")
        results[path.stem] = value
    if not results:
        raise ConfigError(f"there are no results (*.json) in {folder}")
    return results


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page."""
    parts = [HEAD, "<h1>What was measured</h1>", _table(("figure", "value", "where"), headlines(results))]
    order = sorted(results, key=lambda name: (_KINDS.index(_kind(results[name])), name))
    for name in order:
        result = results[name]
        parts.append(f"<h2 id='{html.escape(name)}'>{html.escape(name)}</h2>{_about(result)}")
        match result.get("bench"):
            case "loop":
                parts += _loop(result)
            case "engine":
                parts += _engine(result)
            case "learned":
                parts += _learned(result)
            case _:
                parts.append(_numbers(result))
        parts.append(_met(result))
        for term, meaning in result.get("includes", {}).items():
            parts.append(f"<p class=note><b>{html.escape(term)}</b>: {html.escape(str(meaning))}</p>")
    return "\n".join(parts) + "\n</html>\n"


def headlines(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(figure, value, result), of what is there; numbers that were not measured are left out."""
    rows: list[tuple[str, str, str]] = []
    for name, result in results.items():
        said: list[tuple[str, object, str]] = []
        match result.get("bench"):
            case "loop":
                ratio, streaming = result["ratios"], result["modes"].get("streaming", {})
                said = [
                    ("trained tokens/s, streaming", streaming.get("trained_tokens_per_second"), "{:,.0f}"),
                    ("... over synchronous on the same GPUs", ratio.get("over_synchronous"), "{:.2f} x"),
                    ("... over synchronous, colocated", ratio.get("over_colocated"), "{:.2f} x"),
                    ("time to the same reward, of synchronous", ratio.get("wall_of_synchronous"), "{:.2f}"),
                    ("stall for a version, of a pausing reload", ratio.get("stall_of_reload"), "{:.4f}"),
                ]
            case "engine":
                for arm, figures in result["arms"].items():
                    if arm != "plain":
                        said.append((f"engine throughput, {arm}, over plain SGLang", *_interval(figures.get("ratio"))))
            case "learned":
                for kind, means in result["heldout"].items():
                    first, last = means.get("first"), means.get("last")
                    if kind != "all" and _is_number(first):
                        said.append((f"held-out accuracy on {kind}, from {first:.1%}", last, "{:.1%}"))
            case "updates":
                of = "" if result.get("tp", 1) == 1 else f", tp {result['tp']}"
                said = [
                    (f"engine throughput with two versions a second{of}", *_interval(result.get("throughput_ratio"))),
                    (
                        f"stall for a version that changes 1 %, p99{of}",
                        _at(result, "few", "stall_ms", "p99"),
                        "{:.2f} ms",
                    ),
                ]
            case "endpoint":
                said = [("engine throughput through the endpoint for agents", *_interval(result.get("rate_ratio")))]
            case "learner":
                said = [
                    ("learner, tokens/s", result.get("tokens_per_second"), "{:,.0f}"),
                    ("... model FLOPs utilisation", result.get("model_flops_utilization"), "{:.1%}"),
                ]
            case "learner-gap":
                said = [("log-probs, learner to SGLang, p99", _at(result, "abs", "p99"), "{:.3f}")]
        on = f"{name}: {result.get('gpus') or ''} {result.get('device', '')}".replace(":  ", ": ").strip()
        rows += [(what, form.format(value), on) for what, value, form in said if _is_number(value)]
    return rows


def _interval(ratio: Mapping[str, float] | None) -> tuple[object, str]:
    """Mean and how it is shown."""
    return (None, "") if ratio is None else (ratio["mean"], f"{{:.3f}} ({ratio['low']:.3f} to {ratio['high']:.3f})")


_KINDS = ("learned", "loop", "engine", "updates", "learner", "")


def _kind(result: Mapping[str, Any]) -> str:
    kind = result.get("bench")
    return kind if kind in _KINDS else ""


def _loop(result: Mapping[str, Any]) -> Iterable[str]:
    from scripts.bench import report_plots as plots

    modes = {name: mode for name, mode in result["modes"].items() if mode.get("curve") is not None}
    columns = (
        ("steps", "steps", "{:.0f}"),
        ("trained tok/s", "trained_tokens_per_second", "{:,.0f}"),
        ("generated tok/s", "generated_tokens_per_second", "{:,.0f}"),
        ("G, s", "G", "{:.2f}"),
        ("T, s", "T", "{:.2f}"),
        ("engines busy", "engine_busy", "{:.1%}"),
        ("learner busy", "learner_busy", "{:.1%}"),
        ("age", "age_mean", "{:.2f}"),
        ("masked", "masked_share", "{:.2%}"),
        ("stall p50, ms", ("stall_ms", "p50"), "{:.2f}"),
    )
    rows = [
        [name, *(_shown(_at(mode, *((key,) if isinstance(key, str) else key)), form) for _, key, form in columns),
         _shown(result["u"].get(name), "{:.2f}"), _shown(result["seconds_to_reward"].get(name), "{:.1f}")]
        for name, mode in result["modes"].items()
    ]  # fmt: skip
    yield _table(("mode", *(title for title, _, _ in columns), "u", f"s to {_shown(result['reward'], '{:.3f}')}"), rows)
    if not modes:
        return
    yield "<h3>Reward over wall time</h3>" + plots.reward_over_time(modes)
    yield "<h3>Engines and learner over time</h3>" + plots.timelines(modes)
    yield "<h3>Ages</h3>" + plots.ages(modes)
    samples = {name: [s for s in mode.get("stalls_ms", ()) if s is not None] for name, mode in modes.items()}
    yield "<h3>Stall for each version</h3>" + plots.stalls({name: each for name, each in samples.items() if each})
    bytes_ = [
        (name, _shown(mode.get("update_bytes"), "{:,.0f}"), _shown(mode.get("full_bytes"), "{:,.0f}"))
        for name, mode in modes.items()
    ]
    yield "<h3>Bytes for each version</h3>" + _table(("mode", "sent to an engine", "all weights"), bytes_)


def _engine(result: Mapping[str, Any]) -> Iterable[str]:
    from scripts.bench import report_plots as plots

    rows, ratios = [], {}
    for name, arm in result["arms"].items():
        ratio = arm.get("ratio")
        words = "" if not ratio else f"{ratio['mean']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        rate, versions = _shown(arm["tokens_per_second"], "{:,.0f}"), _shown(arm["versions_per_second"], "{:.2f}")
        rows.append((name, rate, versions, words, len(arm["rounds"])))
        if ratio and name != "plain":
            ratios[name] = ratio
    yield _table(("arm", "tok/s", "versions/s", "over plain (95 %)", "rounds"), rows)
    if ratios:
        yield plots.ratios(ratios, result["targets"])


def _learned(result: Mapping[str, Any]) -> Iterable[str]:
    from scripts.bench import report_plots as plots

    rows = [
        (kind, _shown(means.get("first"), "{:.1%}"), _shown(means.get("last"), "{:.1%}"))
        for kind, means in result["heldout"].items()
    ]
    yield f"<p>{result['steps']} steps in {result['wall_s']:.0f} s, start-up included.</p>"
    yield _table(("held-out", "before", "after"), rows)
    curves = {"all": {"curve": result["curve"]}} | {kind: {"curve": each} for kind, each in result["kinds"].items()}
    drawn = plots.reward_over_time(curves, since="the command was typed")
    yield "<h3>Reward over wall time, on what was trained on</h3>" + drawn


def _numbers(result: Mapping[str, Any]) -> str:
    told = {k: v for k, v in result.items() if k not in ("includes", "targets", "met", "versions", "sglang", "recipe")}
    fields, texts = flatten(told)
    rows = [(name, _shown(value, "{:,.4g}")) for name, value in fields.items() if _is_number(value)]
    rows += [(name, text) for name, text in texts.items() if len(text) < 100]
    more = f"<p class=note>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""
    return _table(("figure", "value"), rows[:MOST_ROWS]) + more


def _about(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    words = [str(result[key]) for key in ("device", "hardware", "date", "command") if result.get(key)]
    return f"<p class=note>{html.escape('; '.join([*words, versions]))}</p>"


def _met(result: Mapping[str, Any]) -> str:
    if not isinstance(result.get("met"), dict):
        return ""
    rows = []
    for name, holds in result["met"].items():
        word = {True: "<span class=met>met</span>", False: "<span class=missed>missed</span>"}.get(
            holds, "not measured"
        )
        rows.append(
            f"<tr><td>{html.escape(name)}<td>{html.escape(str(result.get('targets', {}).get(name, '')))}<td>{word}"
        )
    return "<table><tr><th>goal<th>target<th>" + "".join(rows) + "</table>"


def _table(titles: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{html.escape(title)}" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td{'' if i == 0 else ' class=n'}>{html.escape(str(v))}" for i, v in enumerate(row))
        for row in rows
    )
    return f"<table><tr>{head}{body}</table>"


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object, form: str) -> str:
    return form.format(value) if _is_number(value) else "-"


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path), default="benchmarks")
@click.option(
    "--html", "path", type=click.Path(path_type=pathlib.Path, dir_okay=False), default="runs/benchmarks.html",
    show_default=True,
)  # fmt: skip
def report(folder: pathlib.Path, path: pathlib.Path) -> None:
    """One page with tables and plots from all results in FOLDER, and the headline rows as Markdown."""
    results = read(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results))
    click.echo("| figure | value | where |\n|---|---|---|")
    for row in headlines(results):
        click.echo("| " + " | ".join(row) + " |")
    click.echo(f"\n{path}", err=True)
