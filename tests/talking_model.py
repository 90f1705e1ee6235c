"""A Qwen3 that talks: what it says next depends on the last token and on its version, by a table in the test's hands.

It calls tools as Qwen does, one or several, sometimes malformed, and says bytes that are no text.  It has tokens that
no text is encoded to, so what it says does not come back when it is decoded and encoded; the tokenizer also writes
everything in lower case.  The log-prob of a token says which version sampled it.
"""

import json
import pathlib
from typing import Any

import chat_builders
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

VOCAB, HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 288, 288, 1, 4, 32, 32
PIECES = ('Ċ{"name":Ġ"add",Ġ"arguments":Ġ{"x":Ġ', "}}Ċ", "IĠthink", "Ġso", "ĊNO")
"""No merge makes them: no text is encoded to them."""
FLOOR = 1e-9
MAX_POSITIONS = 4096


def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *PIECES])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.Lowercase()
    specials = (chat_builders.PAD, chat_builders.START, chat_builders.END)
    made.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    made.add_tokens([AddedToken(text, normalized=False) for text in chat_builders.MARKERS])
    return made


def table(version: int = 0, stay: float = 0.3) -> npt.NDArray[np.float64]:
    """[VOCAB, VOCAB] log-prob of each token after each; `stay`: chance that it thinks on."""
    made = tokenizer()

    def of(text: str) -> int:
        found = made.token_to_id(text)
        assert found is not None, text
        return int(found)

    shift = 0.02 * (version % 10)  # what versions differ in
    name, close, think, so, wrong = (of(piece) for piece in PIECES)
    call, called, end, line, no_text = of("<tool_call>"), of("</tool_call>"), of(chat_builders.END), of("Ċ"), of("Ã")
    chances = {
        line: {call: 0.5 + shift, think: 0.3 - shift, no_text: 0.2},
        call: {name: 0.9 - shift, wrong: 0.1 + shift},
        name: {of("1"): 0.5 - shift, of("2"): 0.5 + shift},
        of("1"): {close: 1.0},
        of("2"): {close: 1.0},
        close: {called: 1.0},
        wrong: {close: 0.6, end: 0.4},
        called: {end: 0.7 + shift, line: 0.3 - shift},
        think: {think: stay, so: (1 - stay) * (0.6 + shift), end: (1 - stay) * (0.4 - shift)},
        so: {think: 0.2, end: 0.8},
        no_text: {no_text: 0.4, of("A"): 0.3 + shift, end: 0.3 - shift},
    }
    rows = np.full((VOCAB, VOCAB), FLOOR)
    rows[:, end] = 1.0
    for token, follow in chances.items():
        rows[token] = FLOOR
        for after, chance in follow.items():
            rows[token, after] = chance
    rows = rows / rows.sum(axis=1, keepdims=True)
    return np.asarray(np.log(rows))


def weights(version: int = 0, stay: float = 0.3) -> dict[str, torch.Tensor]:
    """Token t is the t-th unit vector, attention and MLP write nothing, and row n of the head has n's log-probs."""
    generator = torch.Generator().manual_seed(version)

    def noise(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    layer = "model.layers.0."
    width = HEADS * HEAD_DIM
    head = torch.from_numpy(table(version, stay)).T / HIDDEN**0.5  # the norm makes a unit vector as long as that
    return {
        "model.embed_tokens.weight": torch.eye(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        layer + "input_layernorm.weight": torch.ones(HIDDEN),
        layer + "post_attention_layernorm.weight": torch.ones(HIDDEN),
        layer + "self_attn.q_proj.weight": noise(width, HIDDEN),
        layer + "self_attn.k_proj.weight": noise(width, HIDDEN),
        layer + "self_attn.v_proj.weight": noise(width, HIDDEN),
        layer + "self_attn.o_proj.weight": torch.zeros(HIDDEN, width),
        layer + "self_attn.q_norm.weight": torch.ones(HEAD_DIM),
        layer + "self_attn.k_norm.weight": torch.ones(HEAD_DIM),
        layer + "mlp.gate_proj.weight": noise(FFN, HIDDEN),
        layer + "mlp.up_proj.weight": noise(FFN, HIDDEN),
        layer + "mlp.down_proj.weight": torch.zeros(HIDDEN, FFN),
        "lm_head.weight": head.to(torch.float32).contiguous(),
    }


def write(directory: pathlib.Path, stay: float = 0.3) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    ids = {
        "eos_token_id": made.token_to_id(chat_builders.END),
        "pad_token_id": made.token_to_id(chat_builders.PAD),
        "bos_token_id": None,
    }
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-12,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
        **ids,
    }
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": chat_builders.END, "model_max_length": 4096}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(ids))
    (directory / "tokenizer_config.json").write_text(json.dumps(kinds))
    (directory / "chat_template.jinja").write_text(chat_builders.CHATML)
    made.save(str(directory / "tokenizer.json"))
    save_file(weights(0, stay), str(directory / "model.safetensors"), {"format": "pt"})
    return directory
