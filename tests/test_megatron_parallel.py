"""A learner of several processes, for real and over gloo, against one process on the same batches.

One process is compared with transformers and torch's AdamW in test_megatron_families.py.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_reference import OPTIMIZER, write_random_model
from megatron_builders import LENGTHS
from megatron_parallel import Case, Outcome, run, start

from engines.megatron import world
from engines.megatron.logprobs import Columns, token_statistics

DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": True}
PLAIN = {"optimizer": "sgd", "lr": 1.0, "clip_grad": 0.0, "weight_decay": 0.0, "sgd_momentum": 0.0}
"""A weight's change is its gradient."""
TOLERANCE = 2e-5
NOT_COMPARED = ("forward_backward_seconds", "optimizer_seconds")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Of each family, tied and untied; 61 words do not divide by 2."""
    directory = tmp_path_factory.mktemp("models")
    for name, changes in {"qwen3": {}, "qwen2": {"head_dim": ...}, "llama": {"head_dim": ...}}.items():
        architecture = f"{name.capitalize()}ForCausalLM"
        for tied in (True, False):
            path = directory / (f"{name}-tied" if tied else name)
            write_random_model(path, architecture, tie_word_embeddings=tied, vocab_size=61, **changes)
    write_random_model(directory / "bf16", dtype="bfloat16", tie_word_embeddings=True)
    return directory


def case(models: pathlib.Path, of: str, processes: int, name: str = "", **changes: Any) -> Case:
    section = {"micro_batch_tokens": 60, "optimizer": OPTIMIZER, "processes": processes}
    of_case = {key: changes.pop(key) for key in ("lengths", "steps", "aggregation", "head", "spoil") if key in changes}
    return Case(**({"lengths": LENGTHS} | of_case), name=name or of, model=str(models / of), section=section | changes)


def alone(of: Case, **changes: Any) -> Outcome:
    """What one process comes to; the planted error is of several."""
    section = {key: value for key, value in of.section.items() if key not in ("processes", "ddp", "model")}
    spoil = of.spoil if of.spoil == "nan" else ""
    fields = {name: getattr(of, name) for name in ("name", "model", "lengths", "steps", "aggregation", "head")}
    return run(Case(**fields, section=section | changes, spoil=spoil))


def difference(got: Outcome, wanted: Outcome) -> float:
    """The largest of log-probs and weights."""
    assert got.weights.keys() == wanted.weights.keys()
    pairs = [(got.weights[name].float().cpu(), tensor.float().cpu()) for name, tensor in wanted.weights.items()]
    pairs += [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(got.logprobs, wanted.logprobs, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def check(cases: Sequence[Case], outcomes: Mapping[str, Outcome], tolerance: float = TOLERANCE) -> None:
    for each in cases:
        got, wanted = outcomes[each.name], alone(each)
        if each.model.endswith("bf16"):
            assert difference(got, wanted) < 0.1, each.name
            continue
        assert difference(got, wanted) < tolerance, each.name
        for ours, theirs in zip(got.metrics, wanted.metrics, strict=True):
            assert ours.keys() == theirs.keys(), each.name
            for name in theirs.keys() - set(NOT_COMPARED):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (each.name, name)


def test_data_parallel(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    chance = np.random.default_rng(0)
    cases = [
        case(models, "qwen3", 2, "plain", model=RECOMPUTE),
        case(models, "qwen2-tied", 2, "distributed", ddp=DISTRIBUTED, schedule_unit="tokens", schedule=WARM_UP),
        case(models, "qwen3", 2, "overlapped", ddp=OVERLAPPED, spoil="nan"),
        case(models, "bf16", 2, "bf16", ddp=OVERLAPPED),
        case(models, "qwen3", 2, "one sequence", lengths=[70], steps=1),
        case(models, "qwen3", 2, "value", ddp=DISTRIBUTED, head="value"),
    ]
    cases += [gradients(models, 2, number, chance) for number in range(6)]
    outcomes = start(cases, 2, tmp_path / "out")
    check(cases, outcomes)
    assert [report["skipped"] for report in outcomes["overlapped"].metrics] == [0.0, 1.0, 0.0]


WARM_UP = {"lr_warmup_steps": 500}


def gradients(models: pathlib.Path, processes: int, number: int, chance: np.random.Generator, **changes: Any) -> Case:
    """One plain step on random sequences in a random cut."""
    lengths = chance.integers(2, 90, chance.integers(1, 12)).tolist()
    return case(
        models, "qwen3", processes, f"gradients-{number}", steps=1, lengths=lengths, optimizer=PLAIN,
        micro_batch_tokens=int(chance.integers(1, 300)),
        aggregation=("token_mean", "sequence_mean", "constant")[number % 3], **changes,
    )  # fmt: skip


def test_tensor_parallel(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cases = [
        case(models, "qwen3", 2, "plain", model=TENSOR),
        case(models, "qwen2-tied", 2, "sequences", model=SEQUENCE | RECOMPUTE, lengths=[33, 8, 64, 3]),
        case(models, "qwen3-tied", 2, "value", model=SEQUENCE, head="value"),
        case(models, "bf16", 2, "bf16", model=TENSOR),
    ]
    wrong = [case(models, "qwen3", 2, spoil, model=TENSOR, spoil=spoil) for spoil in ("exchanged", "counted once")]
    wrong[1] = case(models, "qwen3", 2, "counted once", model=TENSOR, spoil="counted once", steps=1)
    outcomes = start([*cases, *wrong], 2, tmp_path / "out")
    check(cases, outcomes)
    assert difference(outcomes["exchanged"], alone(wrong[0])) > 0.01, "the comparison sees it"
    norms = [outcome.metrics[0]["gradient_norm"] for outcome in (outcomes["counted once"], alone(wrong[1]))]
    assert norms[0] < 0.99 * norms[1], "the comparison sees it"


def test_pipeline_parallel(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cases = [
        case(models, "qwen3", 2, "untied", model=PIPELINE),
        case(models, "qwen2-tied", 2, "tied", model=PIPELINE | RECOMPUTE, spoil="nan"),
        case(models, "llama-tied", 2, "value", model=PIPELINE, head="value"),
        case(models, "bf16", 2, "bf16", model=PIPELINE, ddp=DISTRIBUTED),
    ]
    check(cases, start(cases, 2, tmp_path / "out"))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ddp", [{}, DISTRIBUTED, OVERLAPPED], ids=["plain", "distributed", "overlapped"])
@pytest.mark.parametrize(
    ("processes", "model"),
    [
        pytest.param(2, {}, id="data2"),
        pytest.param(3, {}, id="data3"),
        pytest.param(2, TENSOR, id="tensor2"),
        pytest.param(2, SEQUENCE, id="sequence2"),
        pytest.param(2, PIPELINE, id="pipeline2"),
        pytest.param(4, TENSOR, id="tensor2-data2"),
        pytest.param(4, PIPELINE, id="pipeline2-data2"),
        pytest.param(4, TENSOR | PIPELINE, id="tensor2-pipeline2"),
    ],
)
def test_every_family_on_every_axis(
    models: pathlib.Path, tmp_path: pathlib.Path, processes: int, model: dict[str, Any], ddp: dict[str, Any]
) -> None:
    families = ("qwen3", "qwen3-tied", "qwen2", "qwen2-tied", "llama", "llama-tied")
    cases = [case(models, family, processes, model=model, ddp=ddp) for family in families]
    chance = np.random.default_rng(processes)
    if not ddp:  # megatron-core's distributed optimizer has no SGD
        cases += [gradients(models, processes, number, chance, model=model) for number in range(6)]
    check(cases, start(cases, processes, tmp_path / "out", timeout_s=600.0))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cases = [
        case(models, "qwen3", 2, "data", ddp=DISTRIBUTED),
        case(models, "bf16", 2, "overlapped", ddp=OVERLAPPED),
        case(models, "qwen3", 2, "spoiled", ddp=OVERLAPPED, spoil="nan"),
    ]
    check(cases, start(cases, 2, tmp_path / "data"), tolerance=1e-4)
    for name, model in {"tensor": TENSOR, "sequence": SEQUENCE | RECOMPUTE, "pipeline": PIPELINE}.items():
        cases = [case(models, of, 2, f"{of}-{name}", model=model) for of in ("qwen3", "qwen2-tied", "bf16")]
        check(cases, start(cases, 2, tmp_path / name), tolerance=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_columns_that_pad_are_not_there(temperature: float) -> None:
    group = world.initialize(0, {}, 1, 60.0).peers and torch.distributed.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    logits = torch.randn(9, 13)
    logits[3, 4] = -torch.inf
    padded = torch.cat([logits, torch.full((9, 3), 50.0)], dim=1).requires_grad_()
    logits.requires_grad_()
    targets = torch.randint(0, 13, (9,))
    targets[3] = 5
    wanted = token_statistics(logits, targets, temperature)
    got = token_statistics(padded, targets, temperature, Columns(group, 0, 13))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    weights = torch.randn(9)
    (got[0] * weights).sum().backward()
    (wanted[0] * weights).sum().backward()
    assert padded.grad is not None and logits.grad is not None
    torch.testing.assert_close(padded.grad[:, :13], logits.grad, rtol=1e-6, atol=1e-6)
    assert torch.equal(padded.grad[:, 13:], torch.zeros(9, 3))
