"""The coding agent: problems whose answers are known, tools that take anything, hidden tests as the reward, played with
OpenAI's own package through the real endpoint."""

import ast
import asyncio
import dataclasses
import itertools
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from endpoint_world import World, play
from sandboxes import inside, needs_sandbox

from actors.sampling import Limits
from actors.tasks import coding, coding_problems
from actors.tasks.coding import Coding, use_tool
from engines.sandbox import box as module
from engines.sandbox.box import Sandbox
from stream_rl.episode import EpisodeFailed
from stream_rl.errors import ConfigError
from stream_rl.plain import pack, unpack
from stream_rl.task import Prompt, load_task, plays

pytestmark = needs_sandbox
ROOM = Limits(max_new_tokens=20_000, max_turn_tokens=8000, max_context_tokens=40_000, max_turns=40)
DOUBLE = Prompt(text="", data={"statement": "Print twice the number.", "tests": [["1", "2"], ["-3", "-6"], ["0", "0"]]})
RIGHT, WRONG, HALF = "print(2 * int(input()))", "print('2')", "n = int(input())\nprint(2 * n if n >= 0 else 'no')"

# -- problems ------------------------------------------------------------------------------------------------


def test_problems_are_many_reproducible_and_well_formed() -> None:
    made = [coding_problems.make(random.Random(seed)) for seed in range(400)]
    assert made == [coding_problems.make(random.Random(seed)) for seed in range(400)]
    assert len({problem.statement for problem in made}) == 400
    for problem in made:
        shown = re.findall(r"Input:\n(.*?)\nOutput:\n", problem.statement, re.DOTALL)
        hidden = [given for given, _ in problem.tests]
        assert len(shown) == 2 and len(set(hidden)) == 8 and not set(shown) & set(hidden)
        assert len({expected for _, expected in problem.tests}) > 2, f"a guess passes: {problem.statement}"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (
            r"input is one line of integers\.  Take those that are divisible by (\d), each squared\.  Print their sum",
            lambda line, k: str(sum(n * n for n in map(int, line.split()) if n % int(k) == 0)),
        ),
        (
            r"In this order, reverse every word, then sort the words alphabetically, then put the words in the opp",
            lambda line: " ".join(sorted((word[::-1] for word in line.split()), reverse=True)),
        ),
        (r"f\(0\) = (\d), f\(1\) = (\d), and f\(n\) = \((\d) \* f\(n-1\) \+ (\d) \* f\(n-2\)\) mod (\d+) ", None),
    ],
)  # fmt: skip
def test_the_answers_are_what_the_statement_asks(said: str, answer: Callable[..., str] | None) -> None:
    """By other means than the generator's."""

    def recurrence(line: str, *numbers: str) -> str:
        first, second, a, b, modulus = map(int, numbers)
        values = [first, second]
        while len(values) <= int(line):
            values.append((a * values[-1] + b * values[-2]) % modulus)
        return str(values[int(line)] % modulus)

    made = map(coding_problems.make, (random.Random(seed) for seed in range(4000)))
    found = ((problem, match) for problem in made if (match := re.search(said, problem.statement)))
    checked = 0
    for problem, match in itertools.islice(found, 5):
        for given, expected in problem.tests:
            assert (answer or recurrence)(given, *match.groups()) == expected, problem.statement
        checked += 1
    assert checked


def test_the_splits_never_meet_and_prompts_travel() -> None:
    task = Coding()
    train = {prompt.data["statement"] for prompt in itertools.islice(task.prompts("train", 0), 300)}
    heldout = [prompt.data["statement"] for prompt in itertools.islice(task.prompts("heldout", 0), 100)]
    assert len(train) == 300 and not train & set(heldout)
    (prompt,) = itertools.islice(task.prompts("train", 1), 1)
    assert unpack(pack(dict(prompt.data))) == prompt.data and prompt.text == ""


# -- tools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("run", '{"command": "echo hi; exit 3"}', r"^hi\n\n\[exit status 3\]$"),
        ("run", '{"command": "sleep 100"}', r"^\[ended at its limit: timeout\]$"),
        ("run", '{"command": "yes"}', r"characters \.\.\."),
        ("run", '{"command": "printf \'\\\\377\'"}', "\N{REPLACEMENT CHARACTER}"),
        ("run", '{"command": ["ls"]}', "takes an object of the strings command"),
        ("run", '{"command": "ls", "sudo": true}', "and nothing else"),
        ("run", '{"command": "ls\\u0000"}', "error|127"),
        ("run", "{}", "takes an object"),
        ("run", "[]", "takes an object"),
        ("run", '{"command": ', "must be JSON"),
        ("run", "", "must be JSON"),
        ("run", "[" * 100_000, "error"),
        ("write_file", '{"path": "a/b", "content": "x"}', "^written$"),
        ("write_file", '{"path": "x", "content": "\\ud800"}', "written|error"),
        ("write_file", '{"path": "../../etc/passwd", "content": "x"}', "^error: .*below the sandbox"),
        ("write_file", '{"path": "", "content": "x"}', "^error"),
        ("write_file", '{"path": "\\u0000", "content": "x"}', "^error"),
        ("write_file", '{"path": "%s", "content": "x"}' % ("a" * 5000), r"(?s)^error: .*too long"),
        ("read_file", '{"path": "/etc/passwd"}', "^error: .*No such file"),
        ("read_file", '{"path": "."}', "^error"),
        ("delete", '{"path": "x"}', "there is no tool 'delete'; there are run, write_file, read_file"),
    ],
)
def test_whatever_a_tool_is_called_with_the_answer_is_text(name: str, arguments: str, said: str) -> None:
    async def scene(box: Sandbox) -> str:
        answer = await use_tool(box, name, arguments)
        assert (await box.run(["true"])).exit == 0
        return answer

    answer = inside(scene, module.Limits(seconds=2.0, processes=16, output_bytes=20_000))
    assert re.search(said, answer), answer
    assert len(answer) < coding.TOOL_OUTPUT + 200


# -- episodes ------------------------------------------------------------------------------------------------


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def solve(source: str) -> str:
    return call("write_file", path="solution.py", content=source)


def episode(says: Sequence[str], task: Coding | None = None, prompt: Prompt = DOUBLE, limits: Limits = ROOM) -> Any:
    """What an agent gets that says these things, and the world it was in."""
    rewards: list[Mapping[str, float]] = []

    async def scene(world: World) -> None:
        world.says(*says)
        made = world.episode()
        rewards.append(await (task or Coding(run_seconds=2.0)).play(prompt, _Model(world.endpoint.address, made.key)))

    world = play(scene, options={"max_context_tokens": limits.max_context_tokens}, limits=limits)
    return rewards[0], world


class _Model:
    def __init__(self, base_url: str, key: str) -> None:
        self.base_url, self.key = base_url, key

    async def turn(self, observation: Any = "", *, tools: Any = ()) -> Any:
        raise AssertionError("the agent uses the endpoint")

    async def reward_so_far(self, reward: float) -> None: ...


def test_an_agent_that_writes_tries_and_corrects_is_rewarded_for_the_right_program() -> None:
    run = call("run", command="echo 4 | python3 solution.py")
    reward, world = episode(["I try." + solve("print(4 * input())"), run, solve(RIGHT) + run, "It is right."])
    assert reward == {"reward": 1.0, "passed": 1.0, "turns": 4.0, "tool_calls": 4.0}
    assert [member for member, *_ in world.course.turns] == [0] * 4, "one trajectory"
    seen = world.text(world.course.turns[-1][1])
    assert "4444\n\n[exit status 0]" in seen and "8\n\n[exit status 0]" in seen
    assert "-6" not in seen, "the hidden tests stay hidden"


@pytest.mark.parametrize(
    ("says", "passed"),
    [
        ([solve(WRONG), "done"], 1 / 3),
        ([solve(HALF), "done"], 2 / 3),
        (["I will not."], 0.0),
        ([solve("print(2 * int(input())"), "done"], 0.0),
        ([solve("while True: pass"), "done"], 0.0),
        ([solve("import os\nprint(2 * int(input()), flush=True)\nos._exit(1)"), "done"], 0.0),
        ([solve(f"import os\nif os.fork():\n  {RIGHT}\nelse:\n  while True: pass"), "done"], 1.0),
        ([call("run", command="ln -s /inside.py solution.py"), "done"], 0.0),
        ([call("run", command="mkdir solution.py"), "done"], 0.0),
        (["<tool_call>{not json}</tool_call>"], 0.0),
        ([call("fly", to="Paris"), solve(RIGHT), "done"], 1.0),
    ],
)
def test_the_share_of_passed_tests_is_the_reward(says: list[str], passed: float) -> None:
    reward, _ = episode(says, Coding(run_seconds=3.0, partial=0.5))
    assert reward["passed"] == pytest.approx(passed)
    assert reward["reward"] == (1.0 if passed == 1.0 else pytest.approx(0.5 * passed))


def test_an_agent_that_never_ends_has_its_turns_and_is_graded() -> None:
    reward, world = episode([solve(RIGHT), *(call("run", command="ls") for _ in range(9))], Coding(turns=3))
    assert reward["reward"] == 1.0 and reward["turns"] == 3.0 and len(world.course.turns) == 3


@pytest.mark.parametrize("limit", [{"max_turns": 2}, {"max_context_tokens": 3200}])
def test_where_the_episode_has_no_room_for_a_turn_what_is_written_counts(limit: dict[str, int]) -> None:
    room = dataclasses.replace(ROOM, max_turn_tokens=500, **limit)
    talk = [solve(RIGHT), *(call("run", command="seq 300") for _ in range(5))]
    reward, _ = episode(talk, Coding(turns=20), limits=room)
    assert reward["reward"] == 1.0 and reward["turns"] < 6


def test_an_endpoint_that_is_gone_fails_the_episode() -> None:
    async def scene() -> None:
        with pytest.raises(EpisodeFailed, match="endpoint_error"):
            await Coding().play(DOUBLE, _Model("http://127.0.0.1:9", "key"))

    asyncio.run(scene())


def test_an_episode_that_is_cancelled_leaves_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[Any] = []
    enter = Sandbox.__aenter__

    async def remember(box: Sandbox) -> Sandbox:
        await enter(box)
        boxes.append(box._process)
        return box

    monkeypatch.setattr(Sandbox, "__aenter__", remember)

    async def scene(world: World) -> None:
        world.holds()
        made = world.episode()
        playing = asyncio.ensure_future(Coding().play(DOUBLE, _Model(world.endpoint.address, made.key)))
        await world.held()
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        world.release()

    play(scene, options={"max_context_tokens": ROOM.max_context_tokens}, limits=ROOM)
    assert len(boxes) == 1 and boxes[0].returncode is not None


# -- as a task -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module._problem.cache_clear()
    monkeypatch.setattr(module, "find_bubblewrap", lambda: None)
    yield
    module._problem.cache_clear()


def test_without_a_sandbox_the_task_says_so_before_anything_starts(no_sandbox: None) -> None:
    with pytest.raises(ConfigError, match="install the package bubblewrap"):
        load_task("actors.tasks.coding:Coding", {})


@pytest.mark.parametrize("options", [{"turns": 0}, {"partial": 2.0}, {"heldout_share": 0.0}, {"memory_mb": 1}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="coding: needs"):
        load_task("actors.tasks.coding:Coding", options)


def test_it_is_a_task_of_many_turns_that_loads_no_torch() -> None:
    assert plays(load_task("actors.tasks.coding:Coding", {"turns": 3}))
    source = pathlib.Path(coding.__file__).read_text()
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert "torch" not in imported and "sglang" not in imported
