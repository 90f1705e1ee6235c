"""Bad input ends with one clear line before anything expensive starts: no process is started, nothing is written."""

import json
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from scripts import preflight, tiny_model
from stream_rl import config
from stream_rl.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = """
[run]
name = "bad"
steps = 2
directory = "{directory}/runs"
[model]
path = "{directory}/model"
[task]
use = "actors.tasks.cashier:Cashier"
[rollout]
group_size = 4
max_new_tokens = 64
[queue]
min_tokens = 100
max_tokens = 4000
[learner]
optimizer = {{lr = 1e-3}}
[sglang]
device = "cpu"
"""


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    tiny_model.create(tmp_path / "model", seed=0)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(directory=tmp_path))
    return tmp_path


def refusal(directory: pathlib.Path, *overrides: str) -> str:
    """The one line that `stream-rl train` ends with."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "train", str(directory / "recipe.toml"), *overrides],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert time.monotonic() - start < 30
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (directory / "runs").exists(), "nothing may have started"
    return lines[0]


def change_config(directory: pathlib.Path, **changes: object) -> None:
    path = directory / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_key_lists_the_known_ones(directory: pathlib.Path) -> None:
    line = refusal(directory, "queue.max_stale=3")
    assert "max_stale" in line
    assert "max_token_age" in line


def test_a_wrong_type_says_what_came(directory: pathlib.Path) -> None:
    line = refusal(directory, 'run.steps="many"')
    assert "run.steps" in line
    assert "'many'" in line


def test_a_missing_model_folder_is_named(directory: pathlib.Path) -> None:
    assert "/nowhere" in refusal(directory, "model.path=/nowhere")


def test_an_unsupported_architecture_names_the_supported_ones(directory: pathlib.Path) -> None:
    change_config(directory, architectures=["MambaForCausalLM"])
    line = refusal(directory)
    assert "MambaForCausalLM" in line
    assert "Qwen3ForCausalLM" in line


@pytest.mark.parametrize("option", ["top_p=0.9", "top_k=20", "min_p=0.1", "repetition_penalty=1.1", "n=2"])
def test_sampling_without_a_correction_is_refused(directory: pathlib.Path, option: str) -> None:
    line = refusal(directory, f"rollout.sampling.{option}")
    assert option.split("=")[0] in line
    assert "correction" in line


def test_a_temperature_of_zero_is_refused(directory: pathlib.Path) -> None:
    assert "temperature" in refusal(directory, "rollout.temperature=0.0")


def test_a_port_in_use_is_named(directory: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refusal(directory, f"sglang.port={port}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise RuntimeError('broken at import')", ["RuntimeError", "broken at import"]),
        ("class Mine:\n    def __init__(self):\n        raise ValueError('no data')", ["ValueError", "no data"]),
        (
            "class Mine:\n    def prompts(self, split, seed):\n        raise KeyError('gone')\n"
            "    def reward(self, prompt, completion):\n        return 0.0",
            ["prompts", "KeyError", "gone"],
        ),
        ("class Mine:\n    def reward(self, prompt, completion):\n        return 0.0", ["prompts"]),
        ("class Other:\n    pass", ["Mine"]),
        (
            "class Mine:\n    def prompts(self, split, seed):\n        return iter([])\n"
            "    def reward(self, prompt, completion):\n        return 0.0",
            ["gave none"],
        ),
    ],
)
def test_a_task_that_raises_or_is_none_is_named(directory: pathlib.Path, body: str, words: list[str]) -> None:
    task = directory / "mine.py"
    task.write_text(body)
    line = refusal(directory, f"task.use={task}:Mine")
    for word in ["mine.py", *words]:
        assert word in line


def test_options_that_a_task_does_not_take_are_named(directory: pathlib.Path) -> None:
    assert "colour" in refusal(directory, "task.options.colour=3")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(directory: pathlib.Path) -> None:
    change_config(directory, vocab_size=8)
    line = refusal(directory)
    assert "tokenizer" in line
    assert "8" in line


def test_a_missing_tokenizer_is_named(directory: pathlib.Path) -> None:
    (directory / "model" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(directory)


def test_a_batch_that_admission_cannot_fill_is_refused(directory: pathlib.Path) -> None:
    assert "min_tokens" in refusal(directory, "queue.min_tokens=100000", "queue.max_tokens=200000")


def test_prompts_too_long_for_the_context_are_refused(directory: pathlib.Path) -> None:
    assert "max_new_tokens" in refusal(directory, "rollout.max_new_tokens=4095")


def test_an_engine_may_have_tensor_parallel_ranks_and_no_others(directory: pathlib.Path) -> None:
    recipe = directory / "recipe.toml"
    preflight.check(config.load(recipe, ["sglang.tp_size=2"]))
    for override, words in (
        ("sglang.pp_size=2", "pp_size must be 1, got 2.*tp_size"),
        ("sglang.pipeline_parallel_size=2", "pipeline_parallel_size must be 1"),
        ("sglang.tensor_parallel_size=2", "tensor_parallel_size .* it is tp_size"),
        ("sglang.tp_size=0", "tp_size must be a number of at least 1, got 0"),
        ("sglang.tp_size=two", "tp_size must be .*'two'"),
    ):
        with pytest.raises(ConfigError, match=words):
            preflight.check(config.load(recipe, [override]))


@pytest.mark.parametrize(
    "override", ["engine.devices=[0,0]", "engine.devices=[-1]", "learner.devices=[1,1]", "run.seconds=-1"]
)
def test_devices_that_cannot_be_taken_are_refused(directory: pathlib.Path, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        preflight.check(config.load(directory / "recipe.toml", [override]))


def test_every_rank_and_every_learner_process_needs_a_device(directory: pathlib.Path) -> None:
    for section, option in (("engine", "sglang.tp_size=2"), ("learner", "learner.processes=2")):
        with pytest.raises(ConfigError, match=f"{section}.devices must name 2 GPUs or more"):
            preflight.check(config.load(directory / "recipe.toml", [option, f"{section}.devices=[3]"]))
    preflight.check(config.load(directory / "recipe.toml", ["engine.devices=[3]", "learner.devices=[3]"]))


@pytest.mark.parametrize("override", ["parts_ahead=0", "verify_every=-1", "keep_deltas=0", "anchor_every=0"])
def test_numbers_with_which_no_update_would_ever_arrive_are_refused(directory: pathlib.Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"weights\.{override.partition('=')[0]} must be at least"):
        preflight.check(config.load(directory / "recipe.toml", [f"weights.{override}"]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.aggregation=foo", ["aggregation", "token_mean", "foo"]),
        ("algorithm.advantage=foo", ["advantage", "grpo", "foo"]),
        ("rollout.heldout_concurrency=0", ["heldout_concurrency", "at least 1"]),
        ("engine.buffer_bytes=0", ["buffer_bytes"]),
        ("engine.count=0", ["engine.count"]),
        ("rollout.group_size=1", ["group_size", "at least 2"]),
        ("sglang.dp_size=2", ["dp_size", "engine.count"]),
        ("sglang.port=abc", ["port", "'abc'"]),
        ("sglang.host=0.0.0.0", ["host"]),
        ("sglang.max_total_tokens=4", ["tokens"]),
        ("learner.checkpoint_every=-1", ["checkpoint_every", "at least 0"]),
        ("supervise.max_restarts=-1", ["max_restarts", "at least 0"]),
        ("supervise.silence_timeout_s=1.0", ["silence_timeout_s", "at least 3"]),
        ("supervise.peer_timeout_s=30.0", ["peer_timeout_s", "above", "silence_timeout_s"]),
    ],
)
def test_settings_that_could_hang_or_fail_late_are_refused(
    directory: pathlib.Path, override: str, words: list[str]
) -> None:
    line = refusal(directory, override)
    for word in words:
        assert word in line


@pytest.mark.server
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sglang.no_such_option=1", ["engine-0", "no_such_option"]),
        ("learner.optimizer.lrr=1.0", ["learner", "lrr"]),
        ("learner.model.no_such_field=1", ["learner", "no_such_field"]),
    ],
)
def test_options_of_others_that_they_do_not_have_end_the_run_in_one_line(
    directory: pathlib.Path, override: str, words: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "train", str(directory / "recipe.toml"), override],
        capture_output=True, text=True, timeout=90, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_prompt_data_that_cannot_travel_is_refused(directory: pathlib.Path) -> None:
    (directory / "mine.py").write_text(
        "from stream_rl.task import Prompt\nclass Mine:\n    def prompts(self, split, seed):\n"
        "        while True:\n            yield Prompt(text='00001=', data={'a': object()})\n"
        "    def reward(self, prompt, completion):\n        return 0.0"
    )
    assert "travel" in refusal(directory, f"task.use={directory / 'mine.py'}:Mine")


def test_a_recipe_that_is_no_toml_is_refused(directory: pathlib.Path) -> None:
    (directory / "recipe.toml").write_text("[run\nname=")
    assert "TOML" in refusal(directory)


PLAYS = """
from stream_rl.task import Prompt

class Plays:
    def __init__(self, text=""): self.text = text
    def prompts(self, split, seed):
        while True: yield Prompt(text=self.text)
    async def play(self, prompt, model): return 1.0

class Waits(Plays):
    def play(self, prompt, model): return 1.0

class Neither:
    def prompts(self, split, seed): yield Prompt(text="a")
"""


def check_plays(directory: pathlib.Path, name: str, *overrides: str) -> None:
    (directory / "plays.py").write_text(PLAYS)
    use = f"task.use={directory}/plays.py:{name}"
    preflight.check(config.load(directory / "recipe.toml", [use, *overrides]))


def test_a_task_that_plays_needs_no_reward_and_no_prompt(directory: pathlib.Path) -> None:
    check_plays(directory, "Plays")
    check_plays(directory, "Plays", "rollout.max_new_tokens=100000")
    check_plays(directory, "Plays", 'task.options={text="abc"}')


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("Waits", "run.steps=2", "play must be a coroutine"),
        ("Neither", "run.steps=2", r"needs a method reward\(\), or play\(\)"),
        (
            "Plays",
            f'task.options={{text="{"a" * 100_000}"}}',
            "what the context or the KV pool leaves beside one sampled",
        ),
        ("Plays", "agent.tool_parser=qwen25", "chat_template"),
        ("Plays", "agent.processes=0", "agent.processes must be at least 1"),
        ("Plays", "agent.max_turns=0", "agent.max_turns must be at least 1"),
        ("Plays", "agent.turn_gap_s=0", "agent.turn_gap_s must be at least"),
        ("Plays", "rollout.max_kv_age=-1", "rollout.max_kv_age must be at least 0"),
    ],
)
def test_what_is_wrong_with_a_task_that_plays_is_said(
    directory: pathlib.Path, name: str, override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_plays(directory, name, override)
