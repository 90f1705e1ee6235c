"""One trajectory as one HTML page that needs nothing else: its turns, and its tokens colored by the log-prob gap."""

import html
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from scripts.trajectory import Trajectory, Turn

LARGE_GAP = 1.0
"""In nats: as dark as it gets."""
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .1em 1em .1em 0; text-align: left; vertical-align: top }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6em; border-left: 4px solid #bbb; background: #f7f7f7 }
pre.model { border-color: #36c; background: #fff } i { font-style: normal } i:hover { outline: 1px solid #36c }
i.m { text-decoration: line-through #999 } #at { position: fixed; bottom: 0; right: 0; background: #222; color: #fff;
padding: .3em 1em; font-family: monospace } .missing { color: #a00 }
"""
_SCRIPT = """
const names = ["token", "id", "log-prob", "learner", "gap", "version", "age"];
document.addEventListener("mouseover", event => {
  const token = event.target.closest("i");
  if (token) document.getElementById("at").textContent =
    token.dataset.t.split("|").map((value, i) => value && names[i] + " " + value).filter(Boolean).join("   ");
});
"""
Decode = Callable[[Sequence[int]], str]


def page(
    found: Trajectory, headline: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]], decode: Decode
) -> str:
    """rows: the cells of each turn, by `columns`."""
    title = html.escape(f"trajectory {found.group}/{found.member}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        "".join(f"<p>{html.escape(line)}</p>" for line in headline),
        "".join(f'<p class="missing">not known: {html.escape(line)}</p>' for line in found.missing),
        "<table><tr>" + "".join(f"<th>{html.escape(name)}" for name in columns[:-1]) + "</tr>",
        *("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row[:-1]) + "</tr>" for row in rows),
        "</table>",
    ]
    for number, turn in enumerate(found.turns):
        parts.append(f"<h3>{number} {turn.kind}</h3><pre class={turn.kind}>{''.join(_text(found, turn, decode))}</pre>")
    parts.append(f'<div id="at"></div><script>{_SCRIPT}</script></html>')
    return "\n".join(parts)


def _text(found: Trajectory, turn: Turn, decode: Decode) -> Iterator[str]:
    ids = found.tokens.ids[turn.start : turn.end].tolist()
    if turn.kind != "model":
        yield html.escape(decode(ids))
        return
    tokens, gaps = found.tokens, found.tokens.gaps()
    for at, text in zip(range(turn.start, turn.end), pieces(ids, decode), strict=True):
        own, gap = tokens.learner_logprobs, None if gaps is None else float(gaps[at])
        said = (
            str(at),
            str(ids[at - turn.start]),
            f"{tokens.logprobs[at]:.4f}",
            "" if own is None else f"{own[at]:.4f}",
            "" if gap is None else f"{gap:+.4f}",
            str(tokens.version(at)),
            "" if tokens.ages is None else str(tokens.ages[at]),
        )
        masked = ' class="m"' if tokens.trainable is not None and not tokens.trainable[at] else ""
        shade = "" if gap is None else _shade(gap)
        yield f'<i{masked} data-t="{html.escape("|".join(said))}"{shade}>{html.escape(text)}</i>'


def _shade(gap: float) -> str:
    """Red where the learner finds the token less likely than the engine did, green where more."""
    strength = 1.0 if not np.isfinite(gap) else min(1.0, abs(gap) / LARGE_GAP)
    if strength < 0.005:
        return ""
    return f' style="background:rgba({"220,60,40" if not gap > 0 else "40,160,70"},{0.7 * strength:.2f})"'


def pieces(ids: Sequence[int], decode: Decode) -> Iterator[str]:
    """The text of each token.  One of which alone nothing can be read, as of a part of a character, shows its id."""
    for token in ids:
        text = decode([token])
        yield text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"<{token}>"
