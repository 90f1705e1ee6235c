"""A coding agent with hidden tests as its reward, as somebody else would have written it: with OpenAI's own package,
against the endpoint of the episode.

The agent has a sandbox with an empty directory, and three tools: run, write_file and read_file.  It is to write
solution.py there.  When it stops calling tools, or has no turns left, the solution runs in another sandbox on inputs
that the agent has not seen; what they should give is compared out here.

    reward   1 if every hidden test passed, else `partial` times the share of those that did
"""

import json
import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from actors.tasks import coding_problems
from engines.sandbox.box import Limits, Result, Sandbox, SandboxLost
from stream_rl.episode import EpisodeFailed, Model
from stream_rl.errors import ConfigError
from stream_rl.task import Prompt, Split

SOLUTION = "solution.py"
SYSTEM = (
    "You write small Python programs.  You work in a directory of your own, through the tools.  Write a program "
    f"{SOLUTION} that reads its input from standard input and prints its output; try it on the examples with `run`, "
    f"for instance run(command=\"printf '1 2\\n' | python3 {SOLUTION}\").  It will be tested on other inputs.  When it "
    "is right, answer without calling a tool."
)
TOOL_OUTPUT = 4000
"""Characters of a tool's answer."""
FILE_BYTES = 64 << 10
ENDED = ("context_length_exceeded", "episode_ended")
"""Codes with which the endpoint says that there is no further turn: what was written so far counts."""


def _tool(name: str, told: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": "string", "description": about} for parameter, about in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": told, "parameters": schema}}


TOOLS = [
    _tool("run", "Run a shell command in your directory; gives its output and exit status.", command="The command."),
    _tool("write_file", "Write a file, in place of an old one.", path="Its path.", content="All of it."),
    _tool("read_file", "Read a file.", path="Its path."),
]


class Coding:
    """A hash of the statement decides whether a problem is held out."""

    def __init__(
        self,
        turns: int = 12,
        partial: float = 0.2,
        heldout_share: float = 0.1,
        run_seconds: float = 5.0,
        memory_mb: int = 256,
        request_timeout_s: float = 600.0,
    ) -> None:
        """turns: of an episode.  run_seconds: of one command, or one test.

        Raises ConfigError where there can be no sandbox, or the package openai is missing.
        """
        if (
            turns < 1
            or not 0.0 <= partial <= 1.0
            or not 0.0 < heldout_share < 1.0
            or run_seconds <= 0
            or memory_mb < 64
        ):
            raise ConfigError(
                "coding: needs turns >= 1, partial in 0..1, heldout_share between 0 and 1, run_seconds above 0 and "
                f"memory_mb >= 64, got {turns}, {partial}, {heldout_share}, {run_seconds} and {memory_mb}"
            )
        if problem := Sandbox.problem():
            raise ConfigError(f"actors.tasks.coding: {problem}")
        try:
            import openai  # noqa: F401 - it takes a second to import, which the process of the first episode need not
        except ModuleNotFoundError as error:
            raise ConfigError(f"actors.tasks.coding needs the package openai ({error}): pip install openai") from error
        self._turns, self._partial, self._heldout_share = turns, partial, heldout_share
        self._limits = Limits(seconds=run_seconds, memory_bytes=memory_mb << 20, output_bytes=FILE_BYTES)
        self._request_timeout_s = request_timeout_s

    def prompts(self, split: Split, seed: int) -> Iterator[Prompt]:
        rng = random.Random(f"{split}/{seed}")
        while True:
            problem = coding_problems.make(rng)
            share = zlib.crc32(problem.statement.encode()) / (1 << 32)
            if (share < self._heldout_share) == (split == "heldout"):
                tests = [list(test) for test in problem.tests]
                yield Prompt(text="", data={"statement": problem.statement, "tests": tests})

    async def play(self, prompt: Prompt, model: Model) -> Mapping[str, float]:
        """The agent's episode.  Raises EpisodeFailed where the sandbox or the endpoint is at fault."""
        try:
            async with Sandbox(self._limits) as box:
                turns, calls = await self._work(prompt, model, box)
                solution = await _read(box, SOLUTION)
            passed = await self._grade(solution, prompt.data["tests"])
        except SandboxLost as error:
            raise EpisodeFailed("sandbox_lost", str(error)) from error
        share = passed / len(prompt.data["tests"])
        reward = 1.0 if share == 1.0 else self._partial * share
        return {"reward": reward, "passed": share, "turns": float(turns), "tool_calls": float(calls)}

    async def _work(self, prompt: Prompt, model: Model, box: Sandbox) -> tuple[int, int]:
        """The agent at its work; how many turns and calls of tools it took."""
        import openai

        messages: list[Any] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": prompt.data["statement"]},
        ]
        tools: Any = TOOLS
        calls = 0
        url, patience = f"{model.base_url}/v1", self._request_timeout_s
        async with openai.AsyncOpenAI(base_url=url, api_key=model.key, timeout=patience) as client:
            for turn in range(self._turns):
                try:
                    answer = await client.chat.completions.create(model="policy", messages=messages, tools=tools)
                except openai.BadRequestError as error:
                    if error.code in ENDED:
                        return turn, calls
                    raise EpisodeFailed("endpoint_refused", str(error)) from error
                except openai.OpenAIError as error:
                    raise EpisodeFailed("endpoint_error", f"{type(error).__name__}: {error}") from error
                said = answer.choices[0].message
                messages.append(said.model_dump(exclude_none=True))
                for call in said.tool_calls or ():
                    assert call.type == "function"
                    done = await use_tool(box, call.function.name, call.function.arguments)
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": done})
                    calls += 1
                if not said.tool_calls:
                    return turn + 1, calls
        return self._turns, calls

    async def _grade(self, solution: bytes | None, tests: list[list[str]]) -> int:
        """How many tests a solution passes.  What a test should give never enters the sandbox."""
        if solution is None:
            return 0
        async with Sandbox(self._limits) as box:
            await box.write(SOLUTION, solution)
            results = [await box.run(["python3", SOLUTION], stdin=f"{given}\n".encode()) for given, _ in tests]
        return sum(_passed(result, expected) for result, (_, expected) in zip(results, tests, strict=True))


async def use_tool(box: Sandbox, name: str, arguments: str) -> str:
    """What a tool says; also to a call that is malformed.  Raises SandboxLost."""
    try:
        given = json.loads(arguments)
        match name, given:
            case "run", {"command": str(command), **rest} if not rest:
                return _told(await box.run(["sh", "-c", command]))
            case "write_file", {"path": str(path), "content": str(content), **rest} if not rest:
                await box.write(path, content.encode(errors="surrogatepass"))
                return "written"
            case "read_file", {"path": str(path), **rest} if not rest:
                return _cut((await box.read(path, FILE_BYTES)).decode(errors="replace"))
    except (ValueError, RecursionError) as error:  # of the JSON, or of half a character in it
        return f"error: the arguments must be JSON: {error}"
    except OSError as error:
        return _cut(f"error: {error}")
    known = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in TOOLS}
    if name not in known:
        return f"error: there is no tool {name!r}; there are {', '.join(known)}"
    return f"error: {name} takes an object of the strings {', '.join(known[name])}, and nothing else"


async def _read(box: Sandbox, path: str) -> bytes | None:
    try:
        return await box.read(path, FILE_BYTES)
    except OSError:
        return None


def _told(result: Result) -> str:
    """A program's output and end, for the model."""
    text = (result.stdout + result.stderr).decode(errors="replace")
    end = f"exit status {result.exit}" if result.ended == "exit" else f"ended at its limit: {result.ended}"
    return f"{_cut(text)}\n[{end}]".lstrip("\n")


def _cut(text: str) -> str:
    if len(text) <= TOOL_OUTPUT:
        return text
    return f"{text[: TOOL_OUTPUT // 2]}\n[... {len(text) - TOOL_OUTPUT} characters ...]\n{text[-TOOL_OUTPUT // 2 :]}"


def _passed(result: Result, expected: str) -> bool:
    """Spaces at the ends of lines, and empty lines at the end, do not matter."""
    said = [line.rstrip() for line in result.stdout.decode(errors="replace").rstrip().split("\n")]
    wanted = [line.rstrip() for line in expected.rstrip().split("\n")]
    return result.ended == "exit" and result.exit == 0 and said == wanted
