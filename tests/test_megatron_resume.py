"""A learner that goes on from its checkpoint does what it would have done without the stop, to the bit."""

import json
import logging
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from huggingface_reference import write_random_model
from megatron_builders import PPO, make_batch, make_learner
from torch import Tensor

from actors.checkpoints import recover
from engines.megatron import resume
from engines.megatron.learner import MegatronLearner
from engines.megatron.snapshot import snapshot
from engines.weights import fingerprint
from stream_rl.errors import WeightsError
from stream_rl.types import Version

RUN = "run-1"
SCHEDULE = {"lr_warmup_steps": 2, "lr_decay_style": "linear", "lr_decay_steps": 9}
MOMENTUM = {"optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.9, "clip_grad": 1.0, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    write_random_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def learner_of(model: pathlib.Path, **changes: Any) -> MegatronLearner:
    return make_learner(model, schedule=SCHEDULE, **changes)


def everything(learner: MegatronLearner) -> dict[str, Tensor]:
    """A copy of all that a next step depends on."""
    taken = snapshot(learner._trained())
    state = taken.states | taken.random | dict(learner.named_weights())
    groups = [[group["lr"], group["weight_decay"]] for group in learner._optimizer.param_groups]
    schedule = {"groups": torch.tensor(groups), "num_steps": torch.tensor(learner._scheduler.num_steps)}
    return {name: tensor.clone() for name, tensor in (state | schedule).items()}


def differences(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[str]:
    def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
        return tensor.dtype, tensor.shape, fingerprint.bits_of(tensor.contiguous().reshape(-1)).tolist()

    both = got.keys() & wanted.keys()
    return got.keys() ^ wanted.keys() | {name for name in both if bits(got[name]) != bits(wanted[name])}


def weights_sum(learner: MegatronLearner) -> int:
    return fingerprint.model_sum(learner.named_weights())


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("dirty", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopping_and_going_on_changes_no_bit(
    tmp_path: pathlib.Path, dtype: str, optimizer: str, dirty: bool, taken: int
) -> None:
    write_random_model(tmp_path / "model", dtype=dtype)
    changes = {"optimizer": MOMENTUM} if optimizer == "momentum" else {}
    straight = learner_of(tmp_path / "model", **changes)
    for step in range(taken):
        straight.train_step(make_batch(step), PPO)
    torch.rand(3)  # the random state is not the seed's
    straight.save_checkpoint(tmp_path / "saved", Version(2, taken), RUN)
    at_save = everything(straight)
    reports = [straight.train_step(make_batch(taken + step), PPO) for step in range(3)]
    wanted, wanted_random = everything(straight), torch.rand(3)

    again = learner_of(tmp_path / "model", **changes)
    if dirty:
        for step in (7, 8):
            again.train_step(make_batch(step), PPO)
    torch.rand(9)
    assert differences(everything(again), at_save), "the comparison sees a difference"
    assert again.load_checkpoint(tmp_path / "saved") == Version(2, taken)
    assert differences(everything(again), at_save) == set()
    for step, report in enumerate(reports):
        got = again.train_step(make_batch(taken + step), PPO)
        assert {n: v for n, v in got.items() if "seconds" not in n} == {
            n: v for n, v in report.items() if "seconds" not in n
        }
    assert differences(everything(again), wanted) == set()
    assert torch.equal(torch.rand(3), wanted_random)


def test_the_weights_alone_are_not_enough(tmp_path: pathlib.Path) -> None:
    """Each part of the training state changes what follows: if a checkpoint missed one, the test above would fail."""
    write_random_model(tmp_path / "model", dtype="bfloat16")
    straight = learner_of(tmp_path / "model")
    for step in range(3):
        straight.train_step(make_batch(step), PPO)
    straight.save_checkpoint(tmp_path / "saved", Version(0, 3), RUN)
    for step in range(3, 6):
        straight.train_step(make_batch(step), PPO)

    def without(spoil: Callable[[MegatronLearner], None]) -> int:
        learner = learner_of(tmp_path / "model")
        learner.load_checkpoint(tmp_path / "saved")
        spoil(learner)
        for step in range(3, 6):
            learner.train_step(make_batch(step), PPO)
        return weights_sum(learner)

    def forget(kind: str) -> Callable[[MegatronLearner], None]:
        def spoil(learner: MegatronLearner) -> None:
            for state in learner._optimizer.optimizer.state.values():
                state[kind].zero_()

        return spoil

    def round_main(learner: MegatronLearner) -> None:
        for parameter in learner._gpt.parameters():
            parameter.main_param.data.copy_(parameter.data.float())

    def restart_schedule(learner: MegatronLearner) -> None:
        learner._scheduler.num_steps = 0
        learner._scheduler.step(0)

    assert without(lambda learner: None) == weights_sum(straight)
    for spoil in (forget("exp_avg"), forget("exp_avg_sq"), forget("step"), round_main, restart_schedule):
        assert without(spoil) != weights_sum(straight)


def test_the_recipes_options_hold_over_those_of_the_checkpoint(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """megatron-core's load_state_dict would bring back the old learning rate without a word."""
    old = learner_of(model)
    for step in range(3):
        old.train_step(make_batch(step), PPO)
    old.save_checkpoint(tmp_path / "saved", Version(0, 3), RUN)
    new = make_learner(model, schedule={}, optimizer={"lr": 5e-4, "weight_decay": 0.3, "adam_beta1": 0.8})
    new.load_checkpoint(tmp_path / "saved")
    assert new.train_step(make_batch(3), PPO)["lr"] == 5e-4
    groups = new._optimizer.param_groups
    assert sorted((group["weight_decay"], group["betas"]) for group in groups) == [
        (0.0, (0.8, 0.999)),
        (0.3, (0.8, 0.999)),
    ]


def test_a_skipped_step_counts_as_a_version_and_not_in_the_schedule(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    straight, again = learner_of(model), learner_of(model)
    masked = make_batch(1)
    masked.loss_weights[:] = 0
    outcomes = [straight.train_step(batch, PPO)["skipped"] for batch in (make_batch(0), masked, make_batch(2))]
    assert outcomes == [0, 1, 0]
    straight.save_checkpoint(tmp_path / "saved", Version(0, 3), RUN)
    assert again.load_checkpoint(tmp_path / "saved") == (0, 3)
    assert again.train_step(make_batch(3), PPO).keys() == straight.train_step(make_batch(3), PPO).keys()
    assert differences(everything(again), everything(straight)) == set()


def test_a_checkpoint_is_a_hugging_face_directory_and_outlives_its_source(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    learner = learner_of(model)
    learner.train_step(make_batch(0), PPO)
    learner.save_checkpoint(tmp_path / "a", Version(0, 1), RUN)
    learner.load_checkpoint(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")  # as `retire` does
    learner.save_checkpoint(tmp_path / "b", Version(0, 1), RUN)
    learner.save(tmp_path / "export")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert all(torch.equal(loaded.state_dict()[name], tensor.cpu()) for name, tensor in learner.named_weights())
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "export").iterdir()} == names
    assert {path.name for path in (tmp_path / "b").iterdir()} == names | {"training", "training.json"}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: pathlib.Path) -> None:
    """What is saved is what was there when it began; to begin another meanwhile is an error."""
    write_random_model(tmp_path / "model", dtype="bfloat16")
    learner = learner_of(tmp_path / "model")
    learner.train_step(make_batch(0), PPO)
    at_save = everything(learner)
    saving = learner.begin_checkpoint(tmp_path / "saved", Version(0, 2), RUN)
    learner.train_step(make_batch(1), PPO)
    thread = threading.Thread(target=saving.finish)
    thread.start()
    learner.train_step(make_batch(2), PPO)
    thread.join()
    assert {name.partition("/")[0] for name in differences(everything(learner), at_save)} >= {"main", "exp_avg", "step"}
    learner.load_checkpoint(tmp_path / "saved")
    assert differences(everything(learner), at_save) == set()

    unfinished = learner.begin_checkpoint(tmp_path / "again", Version(0, 2), RUN)
    with pytest.raises(AssertionError, match="the last checkpoint is still being written"):
        learner.begin_checkpoint(tmp_path / "third", Version(0, 2), RUN)
    unfinished.finish()


def test_a_save_that_fails_leaves_what_was_there_and_the_next_one_works(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(model)
    learner.save_checkpoint(tmp_path / "saved", Version(0, 0), RUN)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resume, "seal", full)
        with pytest.raises(WeightsError, match=r"cannot write .*saved: .*No space left on device; make room"):
            learner.save_checkpoint(tmp_path / "saved", Version(0, 1), RUN)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "saved"}
    assert learner.load_checkpoint(tmp_path / "saved") == Version(0, 0)
    learner.save_checkpoint(tmp_path / "saved", Version(0, 1), RUN)
    assert learner.load_checkpoint(tmp_path / "saved") == Version(0, 1)


def test_what_is_trained_beside_the_policy_is_in_its_checkpoint(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def pair() -> tuple[MegatronLearner, MegatronLearner]:
        return learner_of(model), learner_of(model, optimizer=MOMENTUM)

    learner, critic = pair()
    learner.train_step(make_batch(0), PPO)
    for step in (1, 2):
        critic.train_step(make_batch(step), PPO)
    learner.save_checkpoint(tmp_path / "saved", Version(0, 1), RUN, critic=critic)
    again, other = pair()
    assert again.load_checkpoint(tmp_path / "saved", critic=other) == Version(0, 1)
    assert differences(everything(again), everything(learner)) == set()
    assert differences(everything(other), everything(critic)) == set()
    assert differences(everything(other), everything(learner))
    before = everything(again)
    with pytest.raises(WeightsError, match=r"expected \['policy'\] in it, got \['critic', 'policy'\]"):
        again.load_checkpoint(tmp_path / "saved")
    with pytest.raises(WeightsError, match="the critic's optimizer is SGD in it, and AdamW here"):
        again.load_checkpoint(tmp_path / "saved", critic=learner_of(model))
    damage(tmp_path / "saved" / "critic" / "training" / "rank-00000.safetensors", "flipped")
    with pytest.raises(WeightsError, match=r"damaged: critic/training/rank-00000\.safetensors does not have"):
        again.load_checkpoint(tmp_path / "saved", critic=other)
    assert differences(everything(again), before) == set()


def test_an_export_is_the_policy_alone_and_touches_nothing_that_is_there(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    learner = learner_of(model)
    learner.train_step(make_batch(0), PPO)
    learner.save_checkpoint(tmp_path / "saved", Version(0, 1), RUN, critic=learner_of(model))
    learner.save(tmp_path / "plain")
    resume.export(tmp_path / "saved", tmp_path / "export")
    files = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    for there in ("export", "model"):
        with pytest.raises(WeightsError, match=f"cannot write .*{there}: it is there already; give another place"):
            resume.export(tmp_path / "saved", tmp_path / there)
    with pytest.raises(WeightsError, match=r"plain cannot be resumed from: cannot read training\.json"):
        resume.export(tmp_path / "plain", tmp_path / "other")
    for how, message in (("flipped", "does not have the digest"), ("missing", r"cannot read model\.safetensors")):
        damage(tmp_path / "saved" / "model.safetensors", how)
        with pytest.raises(WeightsError, match=message):
            resume.export(tmp_path / "saved", tmp_path / "other")
        assert not (tmp_path / "other").exists()


# -- damage --------------------------------------------------------------------------------------------------


def damage(path: pathlib.Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "flipped":
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        case "grown":
            path.write_bytes(content + b"\n")


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "grown"])
def test_any_damaged_file_refuses_the_checkpoint_by_name_and_changes_nothing(
    model: pathlib.Path, tmp_path: pathlib.Path, how: str
) -> None:
    learner = learner_of(model)
    learner.train_step(make_batch(0), PPO)
    learner.save_checkpoint(tmp_path / "whole", Version(0, 1), RUN)
    other = learner_of(model)
    before = everything(other)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
        damage(tmp_path / "hurt" / file, how)
        if how == "grown" and file.name == "training.json":
            other.load_checkpoint(tmp_path / "hurt")  # white space
            other = learner_of(model)
        else:
            with pytest.raises(WeightsError, match=rf"hurt .*{file}"):
                other.load_checkpoint(tmp_path / "hurt")
            assert differences(everything(other), before) == set()
        shutil.rmtree(tmp_path / "hurt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 7}, "training.json is damaged: it has another digest"),
        ({"placement": "x"}, "it has another digest"),
        ({"step": "7"}, "training.json is damaged: Expected `int`"),
        ({"format": 1}, "expected format 2, got 1; go on with the release that wrote it"),
        ({"format": 1, "files": 3}, "expected format 2, got 1"),
        ({"format": None}, r"training.json is damaged: Expected `int`, got `null` - at `\$.format`"),
        ({"files": {}}, "it has another digest"),
    ],
)
def test_a_record_that_was_changed_is_refused(
    model: pathlib.Path, tmp_path: pathlib.Path, change: dict[str, Any], message: str
) -> None:
    learner = learner_of(model)
    learner.save_checkpoint(tmp_path / "saved", Version(0, 0), RUN)
    record = json.loads((tmp_path / "saved" / "training.json").read_text())
    (tmp_path / "saved" / "training.json").write_text(json.dumps(record | change))
    with pytest.raises(WeightsError, match=message):
        learner.load_checkpoint(tmp_path / "saved")


def test_another_models_or_optimizers_checkpoint_is_refused(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    learner = learner_of(model)
    learner.train_step(make_batch(0), PPO)
    learner.save_checkpoint(tmp_path / "saved", Version(0, 1), RUN)
    write_random_model(tmp_path / "smaller", num_hidden_layers=1)
    with pytest.raises(
        WeightsError, match=r"the policy's shape is Qwen3ForCausalLM \w+ in it, and Qwen3ForCausalLM \w+ here"
    ):
        learner_of(tmp_path / "smaller").load_checkpoint(tmp_path / "saved")
    sgd = learner_of(model, optimizer=MOMENTUM)
    sgd.train_step(make_batch(1), PPO)
    before = everything(sgd)
    with pytest.raises(WeightsError, match="the policy's optimizer is AdamW in it, and SGD here"):
        sgd.load_checkpoint(tmp_path / "saved")
    assert differences(everything(sgd), before) == set()
    with pytest.raises(WeightsError, match="the policy's schedule_unit is steps in it, and tokens here"):
        learner_of(model, schedule_unit="tokens").load_checkpoint(tmp_path / "saved")


def test_the_newest_whole_checkpoint_of_the_run_is_taken(
    model: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "checkpoints"
    writer, reader = learner_of(model), learner_of(model)
    assert recover(reader, checkpoints, RUN) is None
    sums = {}
    # a later history that began at an earlier step is newer
    for name, version, run in (
        ("step-20", Version(0, 20), RUN),
        ("step-40", Version(0, 40), RUN),
        ("step-60", Version(0, 60), "run-0"),
        ("step-30", Version(1, 30), RUN),
    ):
        writer.train_step(make_batch(version.step), PPO)
        writer.save_checkpoint(checkpoints / name, version, run)
        sums[version] = weights_sum(writer)
    (checkpoints / "notes").mkdir()
    with caplog.at_level(logging.INFO):
        for damaged, wanted in ((None, (1, 30)), ("step-30", (0, 40)), ("step-40", (0, 20))):
            if damaged:
                damage(checkpoints / damaged / "training" / "rank-00000.safetensors", "truncated")
            caplog.clear()
            assert recover(reader, checkpoints, RUN) == wanted
            assert weights_sum(reader) == sums[Version(*wanted)]
            assert not damaged or f"{damaged} is damaged: training/rank-00000.safetensors should have" in caplog.text
    assert "step-60 is of run run-0, this is run-1" in caplog.text
    damage(checkpoints / "step-20" / "training.json", "missing")
    assert recover(learner_of(model), checkpoints, RUN) is None
    assert "beginning again" in caplog.text


def test_the_last_two_are_kept_and_what_comes_later_on_a_dead_line_goes(tmp_path: pathlib.Path) -> None:
    for step in (10, 20, 30, 40, 50, 100):
        (tmp_path / f"step-{step}" / "training").mkdir(parents=True)
    (tmp_path / "final").mkdir()
    resume.retire(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "step-30", "step-40"]
    resume.retire(tmp_path, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "step-30"]
