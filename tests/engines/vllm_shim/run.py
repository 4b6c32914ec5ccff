"""Load checkpoints in vLLM one after the other and save the log-probabilities that each gives to some prompts.

Usage: run.py JOBS, a JSON file with a list of
``{"checkpoint": DIR, "prompts": [[token, ...], ...], "draft": false, "emulate": true, "out": DIR}``; ``emulate`` puts
dequantization in place of vLLM's kernels; without it they are those that vLLM finds for this processor.
Each folder ``out`` gets ``result.json``: the error if there was one, the layers that were emulated, the seconds; and,
if there was no error, ``logprobs.safetensors`` with float32 log-probabilities of the whole vocabulary by prompt number:
after each of its tokens but the last [tokens - 1, V], or, of a draft, those of the MTP head for the token after the
next one [1, V] and as ``next.<number>`` the next one itself, which the model chose.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

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
from vllm.model_executor.models.qwen3_5_mtp import Qwen3_5MTP

REFUSALS = (AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What vLLM raises over a checkpoint: the result of that checkpoint, not the end of the process."""


def main(jobs: str) -> None:
    """Run all jobs of the file, each in a fork of this process: vLLM is imported once, and nothing is left of a job.

    A checkpoint that cannot be loaded, or a kernel that ends its process, does not keep the next ones from running.
    """
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        child = os.fork()
        if child == 0:
            in_a_fork(job)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status < 0:
            write_result(job, error=f"ended by {signal.Signals(-status).name}")
        elif status > 0:
            raise SystemExit(f"{job['checkpoint']}: see above")


def in_a_fork(job: dict[str, Any]) -> NoReturn:
    """Run one job and end the process without what Python does at its end, which is the parent's."""
    status = 1
    try:
        run(job)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict[str, Any]) -> None:
    """One checkpoint, with vLLM's kernels or without them."""
    begin = time.perf_counter()
    if job["emulate"]:
        emulate.install()
    else:
        emulate.allow_software()
    error = None
    answer = draft_logprobs if job["draft"] else prompt_logprobs
    try:
        save_file(answer(job["checkpoint"], job["prompts"]), Path(job["out"]) / "logprobs.safetensors")
    except REFUSALS as raised:
        error = f"{type(raised).__name__}: {raised}"
    write_result(job, error=error, seconds=time.perf_counter() - begin)


def write_result(job: dict[str, Any], *, error: str | None, seconds: float | None = None) -> None:
    """What came of a job, beside its log-probabilities."""
    result = {"error": error, "emulated": emulate.emulated, "seconds": seconds}
    (Path(job["out"]) / "result.json").write_text(json.dumps(result), encoding="utf-8")


def load(checkpoint: str, **options: Any) -> LLM:
    """vLLM with one checkpoint."""
    sees = "vision_config" in read_config(checkpoint)
    return LLM(
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
        **options,
    )


def read_config(checkpoint: str) -> dict[str, Any]:
    """The checkpoint's ``config.json``."""
    config: dict[str, Any] = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    return config


def prompt_logprobs(checkpoint: str, prompts: list[list[int]]) -> dict[str, Tensor]:
    """Natural logarithms of all tokens' probabilities after each token of each prompt but its last."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = load(checkpoint).generate(inputs, sampling, use_tqdm=False)
    config = read_config(checkpoint)
    vocabulary = config.get("text_config", config)["vocab_size"]
    return {str(n): dense(answer.prompt_logprobs, vocabulary) for n, answer in enumerate(answers)}


def draft_logprobs(checkpoint: str, prompts: list[list[int]]) -> dict[str, Tensor]:
    """What the MTP head expects after each prompt and the token that the model itself adds, and that token."""
    drafts: list[Tensor] = []
    compute = Qwen3_5MTP.compute_logits

    def compute_and_record(self: Qwen3_5MTP, *arguments: Any, **options: Any) -> Tensor | None:
        logits = compute(self, *arguments, **options)
        drafts.append(logits)
        return logits

    Qwen3_5MTP.compute_logits = compute_and_record  # type: ignore[method-assign]
    try:
        llm = load(checkpoint, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
        out = {}
        for n, prompt in enumerate(prompts):
            drafts.clear()
            answer = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
            out[str(n)] = drafts[0].to(torch.float32).log_softmax(-1)
            out[f"next.{n}"] = torch.tensor(answer.outputs[0].token_ids[:1])
        return out
    finally:
        Qwen3_5MTP.compute_logits = compute  # type: ignore[method-assign]


def dense(flat: Any, vocabulary: int) -> Tensor:
    """vLLM's flat lists, one run of entries a position, as [positions, V]; NaN where an entry is missing."""
    counts = torch.tensor(flat.end_indices) - torch.tensor(flat.start_indices)
    rows = torch.arange(len(counts) - 1).repeat_interleave(counts[1:])  # nothing comes before the first token
    out = torch.full((len(counts) - 1, vocabulary), torch.nan)
    out[rows, torch.tensor(flat.token_ids)] = torch.tensor(flat.logprobs)
    return out


if __name__ == "__main__":
    main(sys.argv[1])
