"""Rates of a checkpoint in vLLM's CPU build: vllm_rates.py CHECKPOINT PROMPT_TOKENS NEW_TOKENS REPEATS.

Prints JSON like genai_rates.py. BF16, which it runs with kernels of its own; prefill and decode are told apart by
answers of one token and of several.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1"
)

from vllm import LLM, SamplingParams, TokensPrompt


def main(checkpoint: str, prompt: int, new: int, repeats: int) -> None:
    """Time one checkpoint."""
    model = LLM(
        model=checkpoint,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=1,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
        seed=0,
    )
    ids = TokensPrompt(prompt_token_ids=[7 + 31 * i % 1900 for i in range(prompt)])

    def seconds(tokens: int) -> float:
        chosen = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        model.generate(ids, chosen, use_tqdm=False)
        return time.perf_counter() - start

    seconds(2)
    prefill = min(seconds(1) for _ in range(repeats))
    print(json.dumps({"prefill": prefill, "decode": min(seconds(new + 1) for _ in range(repeats)) - prefill}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
