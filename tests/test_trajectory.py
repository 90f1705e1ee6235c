"""`stream-rl trajectory show`: one trajectory out of what a run wrote down, and what is said where it did not."""

import dataclasses
import html
import json
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from actors import leases
from queues.journal import Journal
from queues.records import Ended
from scripts import tiny_model
from scripts.cli import cli
from scripts.trajectory import find
from stream_rl import config, wire
from stream_rl import messages as m
from stream_rl.errors import ConfigError
from stream_rl.types import Version, make_rid

RUN = "r"
FIFTH = Version(0, 5)


def encode(text: str) -> list[int]:
    with tempfile.TemporaryDirectory() as directory:
        tiny_model.create(directory)
        encoded: list[int] = Tokenizer.from_file(f"{directory}/tokenizer.json").encode(text).ids
    return encoded


FIRST, SECOND, SAID, PROMPT = (encode(text) for text in ("FGH", "P<", "\n!", "AB"))
ALL = [*PROMPT, *FIRST, *SAID, *SECOND]
SAMPLED = [0, 0, 1, 1, 1, 0, 0, 1, 1]


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def chunk(
    sequence: int, segment: int, start: int, tokens: Sequence[int], step: int, engine: str = "engine-0"
) -> m.Chunks:
    """One of our trajectory's, with one of another in front of it."""
    mine, count = make_rid(RUN, 4, 1, segment), len(tokens)
    return m.Chunks(
        run=RUN, engine=engine, incarnation=1, sequence=sequence,
        rids=[make_rid(RUN, 4, 11, 0), mine], finishes=["", ""], starts=np.array([0, start]),
        counts=np.array([1, count], np.int32), token_ids=ids(99, *tokens),
        logprobs=np.array([-9.0, *(-0.5 for _ in tokens)], np.float32),
        spans=np.array([[0, 0, 0, 1], [1, 0, step, count]]),
    )  # fmt: skip


def close(sequence: int = 9, **changes: Any) -> m.CloseTrajectory:
    told = m.CloseTrajectory(
        sequence=sequence, group=4, member=1, segment=2, status="done", reward=0.75, reward_parts={"tests": 0.5},
        num_sampled=5,
    )  # fmt: skip
    return dataclasses.replace(told, **changes)


EVENTS: list[tuple[float, Any]] = [
    (1.0, m.OpenGroup(sequence=0, group=4, task="t", members=2, prompt_ids=ids(*PROMPT))),
    (1.5, m.OpenGroup(sequence=1, group=5, task="t", members=2, prompt_ids=ids(1, 2, 3))),
    (2.0, chunk(0, 0, 0, FIRST[:2], 3)),
    (2.25, chunk(0, 0, 0, FIRST[:2], 3)),  # said again
    (2.5, m.Interrupted(sequence=2, group=4, member=1, segment=0, reason="engine_lost")),
    (4.0, chunk(0, 1, 0, FIRST[2:], 4, "engine-1")),
    (4.5, m.AppendTokens(sequence=3, group=4, member=1, segment=1, num_sampled=3, token_ids=ids(*SAID))),
    (4.6, m.AppendTokens(sequence=3, group=4, member=0, segment=1, num_sampled=3, token_ids=ids(1))),
    (5.0, chunk(1, 2, 0, SECOND[:1], 4, "engine-1")),
    (5.5, chunk(2, 2, 0, SECOND, 4, "engine-1")),  # overlaps
    (6.0, close()),
]


def make_run(directory: pathlib.Path, events: Sequence[tuple[float, Any]] = EVENTS) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    tiny_model.create(directory / "model")
    recipe = config.Recipe(
        run=config.Run(name=directory.name, steps=1, directory=str(directory.parent)),
        model=config.Model(path=str(directory / "model")),
        task=config.TaskChoice(use="none:None"),
        queue=config.Queue(min_tokens=4, max_tokens=64),
    )
    config.dump(recipe, directory / "recipe.toml")
    (directory / "queue.json").write_text(json.dumps({"address": "", "run": RUN, "pid": 0}))
    with Journal.open(directory / "journal.db", RUN) as journal:
        for at, event in events:
            journal.append(at, "actor-0", type(event).__name__, wire.encode(event))
        journal.commit()
    return directory


def lease(step: Version = FIFTH, reward: float = 0.75) -> m.Lease:
    """Of group 4: its member 0, ours, and a branch of ours."""
    sampled = np.array([0, 1, *SAMPLED, 0, 1], np.uint8)
    steps = np.array([0, 4, 0, 0, 3, 3, 4, 0, 0, 4, 4, 0, 5], np.int32)
    return m.Lease(
        step=step,
        groups=np.array([4, 4, 4]),
        members=np.array([0, 1, 2], np.int32),
        episodes=np.array([0, 1, 1], np.int32),
        rewards=np.array([0.25, reward, reward], np.float32),
        max_token_ages=np.array([1, 1, 1], np.int32),
        lengths=np.array([2, len(ALL), 2], np.int32),
        token_ids=ids(1, 2, *ALL, 3, 4),
        sampled=sampled,
        trainable=(sampled.astype(bool) & (steps >= step.step - 1)).astype(np.uint8),
        logprobs=(-0.5 * sampled).astype(np.float32),
        histories=np.zeros(len(sampled), np.int32),
        steps=steps,
        ages=(step.step - steps) * sampled,
    )


def train(directory: pathlib.Path, taken: m.Lease, keep: bool = True) -> None:
    told = {
        "history": taken.step.history,
        "step": taken.step.step,
        "groups": taken.groups.tolist(),
        "members": taken.members.tolist(),
    }
    with (directory / "learner.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    if keep:
        path = leases.write(directory / leases.DIRECTORY, taken)
        leases.write_logprobs(
            path, np.where(taken.sampled != 0, -0.5 - np.arange(len(taken.token_ids)) / 100, -7).astype(np.float32)
        )


def show(directory: pathlib.Path, *words: object, label: str = "4/1") -> str:
    done = CliRunner().invoke(cli, ["trajectory", "show", label, "--run", str(directory), *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_from_the_journal_alone_come_turns_waits_and_engines(tmp_path: pathlib.Path) -> None:
    found = find(make_run(tmp_path / "run"), RUN, "4/1")
    assert found.tokens.ids.tolist() == ALL and found.tokens.sampled.tolist() == SAMPLED
    assert found.tokens.steps.tolist() == [0, 0, 3, 3, 4, 0, 0, 4, 4]
    assert found.tokens.gaps() is None and found.reward == 0.75 and found.reward_parts == {"tests": 0.5}
    assert [(turn.kind, turn.start, turn.end, turn.engines) for turn in found.turns] == [
        ("prompt", 0, 2, ()),
        ("model", 2, 5, ("engine-0", "engine-1")),
        ("observation", 5, 7, ()),
        ("model", 7, 9, ("engine-1",)),
    ]
    text = show(tmp_path / "run")
    assert "in flight" in text and "2 turns of the model; 9 tokens, 5 of them sampled; versions 0.3 to 0.4" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("prompt", "model", "observation"))]
    assert rows[1][:5] == ["model", "3", "0.3", "to", "0.4"] and rows[1][5:9] == ["-0.500", "1.00", "s", "2.00"]
    assert rows[2][2:4] == ["0.50", "s"] and rows[2][4] == r"\n!"
    assert "reward 0.75 (tests 0.5)" in text and "FGH" in text


def test_with_the_lease_come_ages_siblings_and_the_learner_s_view(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run")
    train(directory, lease())
    found = find(directory, RUN, "4/1")
    gaps = found.tokens.gaps()
    assert gaps is not None and gaps.tolist() == pytest.approx([0, 0, -0.04, -0.05, -0.06, 0, 0, -0.09, -0.1], abs=1e-6)
    assert found.turns[1].engines == ("engine-0", "engine-1") and found.step == (0, 5)
    text = show(directory)
    assert "rewards of its group, by member: 0: 0.25, 1: 0.75, 2: 0.75 (of episode 1)" in text
    assert "mean -0.068, mean size 0.068, largest -0.1" in text and "1 to 2 (2 masked)" in text
    assert "not known" not in text


def test_of_several_leases_the_newest_counts(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run")
    train(directory, lease(Version(0, 6), reward=0.1))
    train(directory, lease(Version(1, 5), reward=0.2))
    with (directory / "learner.jsonl").open("a") as file:
        file.write('{"history": 1, "st')
    assert find(directory, RUN, "4/1").reward == pytest.approx(0.2)


def test_the_lease_alone_is_enough_and_what_is_missing_is_said(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run", EVENTS[6:])
    train(directory, lease())
    text = show(directory)
    assert "2 turns of the model; 9 tokens" in text and "not known: waits" in text and "keep_journal" in text


def test_a_member_that_brings_its_own_prompt_and_a_branch(tmp_path: pathlib.Path) -> None:
    opened = [
        (1.0, m.OpenGroup(sequence=0, group=4, task="t", members=2, prompt_ids=ids())),
        (2.0, m.AppendTokens(sequence=1, group=4, member=1, segment=0, num_sampled=0, token_ids=ids(*PROMPT))),
        (3.0, chunk(0, 1, 0, FIRST, 3)),
    ]
    found = find(make_run(tmp_path / "own", opened), RUN, "4/1")
    assert [(turn.kind, turn.start, turn.said_s) for turn in found.turns] == [("prompt", 0, 2.0), ("model", 2, None)]
    branch = m.OpenBranch(sequence=1, group=4, member=1, episode=0, prompt_ids=ids(5, 6, 7))
    found = find(make_run(tmp_path / "branch", [opened[0], (1.5, branch), opened[2]]), RUN, "4/1")
    assert found.tokens.ids.tolist() == [5, 6, 7, *FIRST] and found.turns[0].said_s == 1.5


def test_a_dropped_one_says_why(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run", [*EVENTS[:-1], (7.0, close(status="failed", reason="environment_hung"))])
    with Journal.open(directory / "journal.db", RUN) as journal:
        journal.record([Ended(group=4, member=1, outcome="dropped", reason="environment_hung")])
        journal.commit()
    text = show(directory)
    assert "4/1: dropped environment_hung" in text and "\nreward" not in text


def test_the_page_holds_every_token_escaped_and_needs_nothing_else(tmp_path: pathlib.Path) -> None:
    evil = encode("<script>alert('x')</script>&\"")
    directory = make_run(tmp_path / "run", [EVENTS[0], (2.0, chunk(0, 0, 0, evil, 3)), (3.0, close())])
    page = tmp_path / "page.html"
    assert f"wrote {page}" in show(directory, "--html", page)
    text = page.read_text()
    told = re.findall(r'<i data-t="([^"]*)">(.*?)</i>', text)
    assert "".join(html.unescape(piece) for _, piece in told) == "<script>alert('x')</script>&\""
    assert [int(one.split("|")[1]) for one, _ in told] == evil
    assert text.count("<script>") == 1 and "alert('x')</script>" not in text
    assert not re.search(r"(src|href)=|https?:", text)


def test_the_page_shades_by_the_gap_and_strikes_what_was_masked(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run")
    train(directory, lease())
    show(directory, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count('<i class="m"') == 2 and text.count("rgba(220,60,40") == 5


def test_half_a_character_in_a_token_is_no_error(tmp_path: pathlib.Path) -> None:
    text = encode("é")
    directory = make_run(tmp_path / "run", [EVENTS[0], (2.0, chunk(0, 0, 0, text, 3))])
    assert "é" in show(directory, "--full", "--html", tmp_path / "page.html")
    assert f"&lt;{text[0]}&gt;" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("label", "said"), [("4", "17/3"), ("4/x", "17/3"), ("-1/2", "17/3"), ("6/0", "no trajectory 6/0")]
)
def test_a_label_that_leads_nowhere_is_an_error(label: str, said: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises((ConfigError, SystemExit), match=said):
        find(make_run(tmp_path / "run"), RUN, label)


def test_where_nothing_was_kept_the_settings_are_named(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run", EVENTS[3:])
    train(directory, lease(), keep=False)
    with pytest.raises(ConfigError, match=r"step 0\.5.*learner\.leases.*queue\.keep_journal"):
        show(directory)


def test_damaged_log_probs_are_an_error_that_says_so(tmp_path: pathlib.Path) -> None:
    directory = make_run(tmp_path / "run")
    train(directory, lease())
    (directory / "leases" / "0.5.logprobs.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match=r"cannot read .*logprobs\.npy"):
        show(directory)
