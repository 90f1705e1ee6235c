"""Let SGLang continue prompts, and keep what it says of each token: one engine, from its start to its end.

    python -m engines.sglang.samples MODEL OUTPUT --prompts 64 --prompt-tokens 64 --new-tokens 512 --options JSON

Writes token ids and log-probs at temperature 1 to OUTPUT (.npz).  As in `server`, the import shim comes first.
"""

import argparse
import json
import os
import pathlib
from typing import Any

import numpy as np

from engines.sglang import cpu_shim
from stream_rl import runtime

cpu_shim.install()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    for name in ("prompts", "prompt-tokens", "new-tokens", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True, help="SGLang's, under their own names")
    parser.add_argument("--ready-fd", type=int)
    words = parser.parse_args()
    runtime.die_with_parent()
    os.environ |= {"HF_HUB_OFFLINE": "1", "SGLANG_PLUGINS": "none"}
    if words.options.get("device") == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from sglang.srt.entrypoints.engine import Engine

    prompts = np.random.default_rng(0).integers(0, words.vocab, (words.prompts, words.prompt_tokens))
    engine: Any = Engine(model_path=str(words.model), skip_tokenizer_init=True, random_seed=0, **words.options)
    runtime.report_ready(words.ready_fd)
    try:
        answers = engine.generate(
            input_ids=prompts.tolist(),
            sampling_params={"temperature": 1.0, "max_new_tokens": words.new_tokens, "ignore_eos": True},
            return_logprob=True,
        )
    finally:
        engine.shutdown()
    said = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    token_ids = np.array([[entry[1] for entry in row] for row in said], np.int32)
    np.savez(
        words.output,
        token_ids=np.concatenate([prompts.astype(np.int32), token_ids], axis=1),
        logprobs=np.array([[entry[0] for entry in row] for row in said], np.float32),
    )


if __name__ == "__main__":
    main()
