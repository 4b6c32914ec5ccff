"""Load checkpoints in vLLM one after the other and save the log-probabilities that each gives to some prompts.

Usage: run.py JOBS, a JSON file with a list of ``{"checkpoint": DIR, "prompts": [[token, ...], ...], "out": DIR}``.
Each folder ``out`` gets ``result.json``: the error if there was one, the layers that were emulated, the seconds; and,
if there was no error, ``logprobs.safetensors``: a float32 tensor [tokens - 1, V] per prompt, called by its number.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # vLLM would tie each thread to a core, whoever else uses it, and compile a function that ranks tokens
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}

import emulate
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def main(jobs: str) -> None:
    """Run all jobs of the file; a checkpoint that cannot be loaded does not keep the next ones from running."""
    emulate.install()
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        begin = time.perf_counter()
        emulate.emulated.clear()
        out = Path(job["out"])
        error = None
        try:
            save_file(prompt_logprobs(job["checkpoint"], job["prompts"]), out / "logprobs.safetensors")
        except Exception as raised:  # noqa: BLE001  whatever vLLM raises is this checkpoint's result
            error = f"{type(raised).__name__}: {raised}"
        result = {"error": error, "emulated": emulate.emulated, "seconds": time.perf_counter() - begin}
        (out / "result.json").write_text(json.dumps(result), encoding="utf-8")
        cleanup_dist_env_and_memory()


def prompt_logprobs(checkpoint: str, prompts: list[list[int]]) -> dict[str, Tensor]:
    """Natural logarithms of all tokens' probabilities after each token of each prompt but its last."""
    config = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    sees = "vision_config" in config
    llm = LLM(
        model=checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_logprobs=-1,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        # with no images allowed vLLM builds no vision tower, and hides that it could not; images need a tokenizer
        limit_mm_per_prompt={"image": int(sees), "video": 0},
        skip_tokenizer_init=not sees,
        # without this, a parameter that no tensor fills stays as it was allocated
        model_loader_extra_config={"enable_weights_track": True},
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    vocabulary = config.get("text_config", config)["vocab_size"]
    return {str(n): dense(answer.prompt_logprobs, vocabulary) for n, answer in enumerate(answers)}


def dense(flat: Any, vocabulary: int) -> Tensor:
    """vLLM's flat lists, one run of entries a position, as [positions, V]; NaN where an entry is missing."""
    counts = torch.tensor(flat.end_indices) - torch.tensor(flat.start_indices)
    rows = torch.arange(len(counts) - 1).repeat_interleave(counts[1:])  # nothing comes before the first token
    out = torch.full((len(counts) - 1, vocabulary), torch.nan)
    out[rows, torch.tensor(flat.token_ids)] = torch.tensor(flat.logprobs)
    return out


if __name__ == "__main__":
    main(sys.argv[1])
