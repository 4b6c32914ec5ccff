"""Rates of a checkpoint in transformers: transformers_rates.py CHECKPOINT PROMPT_TOKENS NEW_TOKENS REPEATS THREADS.

Prints JSON like genai_rates.py. BF16 weights are loaded as float32, in which a CPU without BF16 units is faster.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(checkpoint: str, prompt: int, new: int, repeats: int, threads: int) -> None:
    """Time one checkpoint."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.train(False)
    ids = torch.tensor([[7 + 31 * i % 1900 for i in range(prompt)]])
    prefill, decode = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        out = model(ids, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        filled = time.perf_counter()
        for _ in range(new):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        prefill.append(filled - start)
        decode.append(time.perf_counter() - filled)
    print(json.dumps({"prefill": min(prefill), "decode": min(decode)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
