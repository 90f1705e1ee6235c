"""Every family of models against transformers with torch's AdamW: log-probs, losses, gradient norms, weights."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_reference import (
    CLIP,
    largest_logprob_difference,
    reference_optimizer,
    reference_step,
    write_random_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_builders import PPO, make_batch, make_learner
from test_megatron_changes import applied, equal, flat
from test_megatron_huggingface import SHAPE
from torch import Tensor

from engines.megatron import found
from engines.megatron.attention import rotary_table
from engines.megatron.model_shape import FAMILIES, ModelShape, read_model_shape
from engines.megatron.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from stream_rl.errors import ConfigError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3ForCausalLM", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    "qwen2": ("Qwen2ForCausalLM", {"head_dim": ...}),
    "qwen2-tied-yarn": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "llama": ("LlamaForCausalLM", {"head_dim": ..., "rope_parameters": LINEAR}),
    "llama-tied-llama3": ("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}
STEPS = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(directory: pathlib.Path, name: str, **changes: Any) -> Any:
    architecture, own = MODELS[name]
    return write_random_model(directory, architecture, **(own | changes))


def test_every_family_is_among_them() -> None:
    assert {architecture for architecture, _ in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_steps_match_transformers_and_adamw(tmp_path: pathlib.Path, name: str) -> None:
    reference = write(tmp_path / "model", name)
    before = {key: parameter.detach().clone() for key, parameter in reference.named_parameters()}
    learner = make_learner(tmp_path / "model")
    assert largest_logprob_difference(learner, reference, make_batch(9)) < 5e-6

    optimizer = reference_optimizer(reference)
    for step in range(STEPS):
        batch = make_batch(step)
        metrics = learner.train_step(batch, PPO)
        loss, norm = reference_step(reference, optimizer, batch, PPO)
        assert norm > CLIP, "the comparison covers clipping"
        assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
        assert metrics["gradient_norm"] == pytest.approx(norm, rel=5e-6)
    wanted = dict(reference.named_parameters())
    got = dict(learner.named_weights())
    assert got.keys() == wanted.keys()
    for key, tensor in got.items():
        assert (wanted[key] - before[key]).abs().max() > 1e-3, f"{key} was not trained"
        torch.testing.assert_close(tensor, wanted[key].detach(), rtol=0, atol=1e-5)
    assert largest_logprob_difference(learner, reference, make_batch(9)) < 1e-5


def exchanged(weights: dict[str, Tensor], *names: str) -> None:
    first, second = (f"model.layers.1.self_attn.{name}" for name in names)
    weights[first], weights[second] = weights[second], weights[first]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *((name, ("k_proj.weight", "v_proj.weight")) for name in ("qwen3", "qwen2", "llama")),
        ("qwen2", ("k_proj.bias", "v_proj.bias")),
    ],
)
def test_exchanged_keys_and_values_are_seen(tmp_path: pathlib.Path, name: str, parts: tuple[str, str]) -> None:
    reference = write(tmp_path / "model", name)
    file = tmp_path / "model" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    exchanged(weights, *parts)
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    assert largest_logprob_difference(make_learner(tmp_path / "model"), reference, make_batch(9)) > 0.02


@pytest.mark.parametrize("name", ["qwen3-yarn", "qwen2-tied-yarn", "llama", "llama-tied-llama3"])
def test_a_scaling_that_is_forgotten_or_another_is_seen(tmp_path: pathlib.Path, name: str) -> None:
    reference = write(tmp_path / "model", name)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    scaling = config["rope_parameters"]
    theta = scaling["rope_theta"]
    for changed in ({"rope_type": "default", "rope_theta": theta}, scaling | {"factor": scaling["factor"] * 2}):
        path.write_text(json.dumps(config | {"rope_parameters": changed}))
        assert largest_logprob_difference(make_learner(tmp_path / "model"), reference, make_batch(9)) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied-yarn", "llama-tied-llama3"])
def test_weights_leave_as_they_came_and_transformers_loads_them(tmp_path: pathlib.Path, name: str, dtype: str) -> None:
    source, target = tmp_path / "model", tmp_path / "saved"
    write(source, name, dtype=dtype)
    learner = make_learner(source)
    stored = safetensors.torch.load_file(source / "model.safetensors")
    weights = dict(learner.named_weights())
    assert weights.keys() == stored.keys()
    assert all(weights[n].dtype == stored[n].dtype and torch.equal(weights[n], stored[n]) for n in stored)
    assert learner.train_step(make_batch(0), PPO)["skipped"] == 0.0
    learner.save(target)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype))
    assert all(torch.equal(loaded.state_dict()[n], tensor) for n, tensor in learner.named_weights())
    assert type(loaded).__name__ == MODELS[name][0]
    moved = {n for n, tensor in learner.named_weights() if not torch.equal(tensor, stored[n])}
    assert {n for n in stored if "_proj" in n or "embed" in n} <= moved, "biases among them"
    assert largest_logprob_difference(learner, loaded.float(), make_batch(9)) < (1e-5 if dtype == "float32" else 0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied-yarn", "llama-tied-llama3"])
def test_found_changes_are_the_update_biases_among_them(
    tmp_path: pathlib.Path, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "SLICE", 21)
    write(tmp_path / "model", name, dtype=dtype)
    learner = make_learner(tmp_path / "model")
    learner.watch_changes()
    for step in range(2):
        before = flat(learner)
        learner.train_step(make_batch(step), PPO)
        pieces = learner.take_changes().pieces()
        assert equal(applied(before, pieces, flat(learner)), flat(learner))
        biases = {piece.name.rpartition(".layers.0.self_attn.")[2] for piece in pieces if piece.name.endswith(".bias")}
        assert {"q_proj.bias", "k_proj.bias", "v_proj.bias"} <= biases or "qwen2" not in name


def test_a_checkpoint_of_another_family_is_refused_by_tensor(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "model", "qwen2")
    path = tmp_path / "model" / "config.json"
    text = path.read_text().replace("Qwen2ForCausalLM", "LlamaForCausalLM")
    path.write_text(text)
    with pytest.raises(Exception, match=r"unknown \['model\.layers\.0\.self_attn\.k_proj\.bias'"):
        make_learner(tmp_path / "model")


def test_what_transformers_writes_for_each_model_is_understood(tmp_path: pathlib.Path) -> None:
    """And what it means without head_dim."""
    for name, (architecture, own) in MODELS.items():
        reference = write(tmp_path / name, name)
        shape = read_model_shape(tmp_path / name)
        assert shape.architecture == architecture
        assert shape.head_dim == reference.model.layers[0].self_attn.head_dim == (8 if "head_dim" in own else 16)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("head_dim", None)
        path.write_text(json.dumps(config))
        if architecture == "Qwen3ForCausalLM":
            with pytest.raises(ConfigError, match="head_dim"):
                read_model_shape(tmp_path / name)
        else:
            assert read_model_shape(tmp_path / name).head_dim == 8


# -- RoPE ----------------------------------------------------------------------------------------------------

KINDS = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
POSITIONS = 300
factors, originals = st.floats(1.0, 64.0), st.integers(16, 8192)
scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, factor=factors),
    st.builds(
        Llama3Scaling, factor=factors, low_freq_factor=st.floats(0.5, 2.0), high_freq_factor=st.floats(2.5, 32.0),
        original_max_position_embeddings=originals,
    ),
    st.builds(
        YarnScaling, factor=factors, beta_slow=st.floats(0.5, 4.0), beta_fast=st.floats(4.5, 64.0),
        original_max_position_embeddings=originals,
    ),
)  # fmt: skip


def rope_shape(scaling: RopeScaling | None, head_dim: int, theta: float) -> ModelShape:
    return dataclasses.replace(SHAPE, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)


def rope_parameters(shape: ModelShape) -> dict[str, Any]:
    values = {} if shape.rope_scaling is None else dataclasses.asdict(shape.rope_scaling)
    kind = "default" if shape.rope_scaling is None else KINDS[type(shape.rope_scaling)]
    return {"rope_type": kind, "rope_theta": shape.rope_theta, **values}


def waves(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Cosine and sine [positions, head_dim / 2] of the learner."""
    cosine, sine = (table[:, 0] for table in rotary_table(shape, POSITIONS, torch.device("cpu")))
    assert torch.equal(*cosine.chunk(2, dim=1)) and torch.equal(-sine.chunk(2, dim=1)[0], sine.chunk(2, dim=1)[1])
    return cosine.chunk(2, dim=1)[0], sine.chunk(2, dim=1)[1]


@settings(max_examples=100, deadline=None, database=None)
@given(scalings, st.sampled_from([2, 8, 64, 128]), st.sampled_from([100.0, 1e4, 5e5, 1e6]))
def test_frequencies_are_those_of_transformers(scaling: RopeScaling | None, head_dim: int, theta: float) -> None:
    shape = rope_shape(scaling, head_dim, theta)
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=rope_parameters(shape))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    wanted = rotary(torch.empty(0), torch.arange(POSITIONS)[None])
    for got, theirs in zip(waves(shape), wanted, strict=True):
        # a last place of the frequency, at the last position
        torch.testing.assert_close(got, theirs[0].chunk(2, dim=1)[0], rtol=0, atol=1e-4)


@pytest.mark.server
@pytest.mark.long
def test_frequencies_are_those_of_sglang(tmp_path: pathlib.Path) -> None:
    """Its rotary tables, from its own factory, in a process with what lets it import here."""
    shapes = [
        rope_shape(scaling, 64, 5e5)
        for scaling in (
            None,
            LinearScaling(factor=2.5),
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
            YarnScaling(factor=4.0, original_max_position_embeddings=128),
            YarnScaling(factor=4.0, original_max_position_embeddings=128, beta_fast=8.0, beta_slow=2.0),
        )
    ]
    (tmp_path / "rope.json").write_text(json.dumps([rope_parameters(shape) for shape in shapes]))
    code = f"""
import json, torch
from engines.sglang import cpu_shim
cpu_shim.install()
from safetensors.torch import save_file
from sglang.srt.layers.rotary_embedding.factory import get_rope
given = json.load(open({str(tmp_path / "rope.json")!r}))
made = [get_rope(64, 64, {POSITIONS}, 5e5, True, rope, torch.float32) for rope in given]
save_file({{str(i): rope.cos_sin_cache.clone() for i, rope in enumerate(made)}}, {str(tmp_path / "tables")!r})
"""
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
    tables = safetensors.torch.load_file(tmp_path / "tables")
    seen: list[Tensor] = []
    for number, shape in enumerate(shapes):
        ours, theirs = torch.cat(waves(shape), dim=1), tables[str(number)][:POSITIONS]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert all((ours - other).abs().max() > 0.1 for other in seen), "the tables are different ones"
        seen.append(ours)
