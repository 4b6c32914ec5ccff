"""Rates of a package in onnxruntime-genai: genai_rates.py PACKAGE PROMPT_TOKENS NEW_TOKENS REPEATS.

Prints JSON: seconds of the fastest prefill, with the first token, and of the fastest decode.
"""

from __future__ import annotations

import json
import sys
import time

import onnxruntime_genai as genai


def main(package: str, prompt: int, new: int, repeats: int) -> None:
    """Time one package."""
    model = genai.Model(package)
    ids = [7 + 31 * i % 1900 for i in range(prompt)]
    prefill, decode = [], []
    for _ in range(repeats):
        params = genai.GeneratorParams(model)
        length = prompt + new + 1
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        filled = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        prefill.append(filled - start)
        decode.append(time.perf_counter() - filled)
    print(json.dumps({"prefill": min(prefill), "decode": min(decode)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
