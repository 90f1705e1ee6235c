import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.megatron import cpu
from engines.megatron.checkpoint import CheckpointTensors, save_checkpoint
from engines.megatron.huggingface import fuse_qkv, to_huggingface, to_megatron
from engines.megatron.model_shape import FAMILIES, ModelShape, expected_shapes
from stream_rl.errors import ConfigError, WeightsError

SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM",
    hidden_size=8,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn_size=10,
    vocab_size=12,
    max_positions=64,
    rms_norm_epsilon=1e-6,
    rope_theta=1e4,
    tied=False,
    dtype="float32",
    eos_token_ids=(1,),
)


def random_weights(shape: ModelShape) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, shape.dtype)
    return {name: torch.randn(size).to(dtype) for name, size in expected_shapes(shape).items()}


@given(
    st.sampled_from(sorted(FAMILIES)), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_mapping_there_and_back_is_bit_exact(
    family: str, kv_heads: int, share: int, layers: int, tied: bool, dtype: str
) -> None:
    shape = dataclasses.replace(
        SHAPE, architecture=family, heads=kv_heads * share, kv_heads=kv_heads, layers=layers, tied=tied, dtype=dtype
    )
    weights = random_weights(shape)
    back = dict(to_huggingface(shape, dict(to_megatron(shape, weights))))
    assert list(back) == list(weights)
    assert all(back[name].dtype == weights[name].dtype and torch.equal(back[name], weights[name]) for name in weights)


def test_fused_heads_are_interleaved_by_key_head() -> None:
    """As megatron-core's SelfAttention.get_query_key_value_tensors splits them: [groups, heads per group + 2, d]."""
    query, key, value = torch.zeros(24, 8), torch.zeros(12, 8), torch.zeros(12, 8)
    for head in range(4):
        query[head * 6 : head * 6 + 6] = head
    for head in range(2):
        key[head * 6 : head * 6 + 6] = 10 + head
        value[head * 6 : head * 6 + 6] = 20 + head
    for columns in (slice(None), 0):  # weights, biases
        fused = fuse_qkv(SHAPE, query[:, columns], key[:, columns], value[:, columns])
        assert fused.shape == (48, *query[:, columns].shape[1:])
        assert fused.reshape(48, -1)[::6, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_each_family_has_the_tensors_of_its_layers() -> None:
    def names(architecture: str) -> set[str]:
        shape = dataclasses.replace(SHAPE, architecture=architecture, layers=1)
        return {name.removeprefix("model.layers.0.self_attn.") for name in expected_shapes(shape)}

    llama = names("LlamaForCausalLM")
    assert names("Qwen3ForCausalLM") - llama == {"q_norm.weight", "k_norm.weight"}
    assert names("Qwen2ForCausalLM") - llama == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert llama == names("Qwen3ForCausalLM") & names("Qwen2ForCausalLM")
    assert not any("bias" in name or "_norm" in name for name in llama - {"model.norm.weight"})


def test_an_output_layer_stored_beside_a_tied_embedding_is_ignored() -> None:
    shape = dataclasses.replace(SHAPE, tied=True)
    weights = random_weights(shape)
    assert "lm_head.weight" not in weights
    extended = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    assert [name for name, _ in to_megatron(shape, extended)] == [name for name, _ in to_megatron(shape, weights)]


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    weights = random_weights(SHAPE)
    missing = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(WeightsError, match=r"missing \['model\.norm\.weight'\] \(1\), unknown \['model\.bias'\]"):
        dict(to_megatron(SHAPE, {**missing, "model.bias": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: .* \[8\], the checkpoint has torch.float32 \[9\]"):
        dict(to_megatron(SHAPE, {**weights, "model.norm.weight": torch.zeros(9)}))
    with pytest.raises(WeightsError, match=r"torch\.float16"):
        dict(to_megatron(SHAPE, {**weights, "model.norm.weight": torch.zeros(8, dtype=torch.float16)}))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 500])
def test_a_saved_directory_reads_back_bit_exact(tmp_path: pathlib.Path, shard_bytes: int) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "unrelated.bin"):
        (source / name).write_text(name)
    weights = random_weights(SHAPE)
    save_checkpoint(target, weights.items(), source, shard_bytes)
    with CheckpointTensors(target) as read:
        assert set(read) == set(weights)
        assert len(read) == len(weights)
        assert all(torch.equal(read[name], weights[name]) for name in weights)
    shards = [safetensors.torch.load_file(path) for path in target.glob("*.safetensors")]
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_bytes for shard in shards)
    assert (target / "model.safetensors.index.json").exists() == (len(shards) > 1) == (shard_bytes == 500)
    copied = {path.name for path in target.iterdir() if not path.name.startswith("model")}
    assert copied == {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert [path.name for path in target.parent.iterdir()] == ["target"], "nothing temporary stays"


def test_a_failed_save_leaves_the_old_directory(tmp_path: pathlib.Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    old = {"a": torch.zeros(2)}
    save_checkpoint(target, old.items(), source)

    def failing():  # type: ignore[no-untyped-def]
        yield "a", torch.ones(2)
        raise OSError("disk full")

    with pytest.raises(WeightsError, match=r"cannot write .*target: disk full; make room"):
        save_checkpoint(target, failing(), source)
    assert torch.equal(safetensors.torch.load_file(target / "model.safetensors")["a"], old["a"])
    save_checkpoint(target, {"a": torch.ones(2)}.items(), source)
    assert torch.equal(safetensors.torch.load_file(target / "model.safetensors")["a"], torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_views_of_one_parameter_can_be_saved(tmp_path: pathlib.Path) -> None:
    both = torch.arange(8.0)
    save_checkpoint(tmp_path / "target", zip("ab", both.chunk(2), strict=True), tmp_path)
    with CheckpointTensors(tmp_path / "target") as read:
        assert read["b"].tolist() == [4, 5, 6, 7]


def test_a_directory_without_weights_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"expected \*\.safetensors"):
        CheckpointTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match="cannot read the weights"):
        CheckpointTensors(tmp_path)
    with pytest.raises(WeightsError, match="got none"):
        save_checkpoint(tmp_path / "target", (), tmp_path)


def test_the_hook_rewrites_only_device_names() -> None:
    source = 'x = torch.zeros(1, device="cuda")\ny = x.cuda()\nz = torch.cuda.current_device()\n'
    assert cpu.rewrite("module", source) == 'x = torch.zeros(1, device="cpu")\ny = x\nz = "cpu"\n'
    with pytest.raises(ImportError, match="found none"):
        cpu.rewrite("module", "x = 1\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the hook does nothing with CUDA")
def test_the_hook_refuses_to_come_second() -> None:
    code = """
import sys, types
sys.modules["megatron.core.jit"] = types.ModuleType("megatron.core.jit")
from engines.megatron import cpu
try:
    cpu.install()
except ImportError as error:
    sys.exit("must run before" not in str(error))
sys.exit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
