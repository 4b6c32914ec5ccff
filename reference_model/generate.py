"""Continue token sequences, greedily or by sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_model.model import CausalLM
from reference_model.norm import widen


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw a token. ``top_k`` 0 and ``top_p`` 1 leave every token its chance."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling needs temperature > 0, top_k >= 0 and 0 < top_p <= 1, not {self}")


def token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """``softmax(logits / temperature)`` of the tokens that may be drawn, [B, V] -> [B, V] in at least fp32.

    Kept are the ``top_k`` likeliest, and of these the fewest whose probabilities reach ``top_p`` (Holtzman et al.
    2019, arXiv 1904.09751). The likeliest token is always kept; among equals the lower id comes first.
    """
    scores, order = (widen(logits) / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scores[:, sampling.top_k :] = -math.inf
    probabilities = scores.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_ids: tuple[int, ...] | None = None,
) -> Tensor:
    """Continue ``input_ids`` [B, T] by at most ``max_new_tokens``: [B, T + n], the prompt included.

    Greedy without ``sampling``; with it, the same ``generator`` state draws the same tokens. A row that has produced
    one of ``stop_ids`` (the config's end-of-sequence tokens by default) repeats it until every row has stopped.
    """
    stops = torch.tensor(model.config.eos_token_ids if stop_ids is None else stop_ids, dtype=input_ids.dtype)
    ids, new, cache = input_ids, input_ids, None
    stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool)
    for _ in range(max_new_tokens):
        output = model(new, cache=cache, last_logits_only=True)
        cache, logits = output.cache, output.logits[:, -1]
        if sampling is None:
            drawn = logits.argmax(-1)
        else:
            drawn = torch.multinomial(token_probabilities(logits, sampling), 1, generator=generator).squeeze(-1)
        drawn = torch.where(stopped, ids[:, -1], drawn)
        ids, new = torch.cat((ids, drawn[:, None]), dim=1), drawn[:, None]
        stopped = stopped | torch.isin(drawn, stops)
        if bool(stopped.all()):
            break
    return ids
