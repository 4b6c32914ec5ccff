"""Continue token sequences: greedily, by sampling, or greedily with drafts of the prediction head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_model.draft import draft_tokens, following, judge
from reference_model.model import CausalLM, Output
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Continued sequences.

    Attributes:
        tokens: int64 [B, T + n], the prompt as it was given and what follows it.
        drafted: tokens that the prediction head proposed, over all rows.
        accepted: how many of them the model would have chosen itself.
    """

    tokens: Tensor
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """``accepted / drafted``; not a number when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else math.nan


@torch.no_grad()
def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    embeddings: Tensor | None = None,
    position_ids: Tensor | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_ids: tuple[int, ...] | None = None,
    draft: int = 0,
) -> Generation:
    """Continue the prompts ``input_ids`` [B, T] by at most ``max_new_tokens``.

    Greedy without ``sampling``; with it, the same ``generator`` state draws the same tokens. A row that has produced
    one of ``stop_ids`` (the config's end-of-sequence tokens by default) repeats it until every row has stopped.
    ``attention_mask``, ``embeddings`` and ``position_ids`` are of the prompt, as in ``CausalLM.forward``. With
    ``draft`` the prediction head proposes so many tokens before each forward; what comes out stays the same, except
    where rounding decides between two tokens.

    Raises:
        ValueError: ``draft`` is negative, or not 0 with ``sampling`` or a model without prediction head; a prompt is
            padding alone, or does not fit the model.
    """
    if draft < 0 or (draft and (sampling is not None or not model.config.mtp_num_hidden_layers)):
        raise ValueError(f"draft={draft}: drafting needs a prediction head (mtp_num_hidden_layers) and greedy choice")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if attention_mask is not None and not bool(attention_mask.bool().any(-1).all()):
        raise ValueError("attention_mask leaves a prompt without tokens: there is nothing to go on from")
    if not max_new_tokens:
        return Generation(tokens=input_ids)
    stops = model.config.eos_token_ids if stop_ids is None else stop_ids
    output = model(
        input_ids,
        attention_mask=attention_mask,
        embeddings=embeddings,
        position_ids=position_ids,
        last_logits_only=True,
    )
    if draft:
        prompt = _Prompt(ids=input_ids, mask=attention_mask, embeddings=embeddings, positions=position_ids)
        return _generate_drafted(model, prompt, output, max_new_tokens, stops, draft)
    ends = torch.tensor(stops, dtype=input_ids.dtype, device=input_ids.device)
    stopped = torch.zeros(input_ids.shape[0], 1, dtype=torch.bool, device=input_ids.device)
    new: list[Tensor] = []
    while True:
        if sampling is None:
            drawn = output.logits.argmax(-1)
        else:
            drawn = torch.multinomial(token_probabilities(output.logits[:, -1], sampling), 1, generator=generator)
        new.append(torch.where(stopped, new[-1], drawn) if new else drawn)
        stopped = stopped | torch.isin(new[-1], ends)
        if len(new) == max_new_tokens or bool(stopped.all()):
            return Generation(tokens=torch.cat((input_ids, *new), dim=1))
        output = model(new[-1], cache=output.cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    ids: Tensor
    mask: Tensor | None
    embeddings: Tensor | None
    positions: Tensor | None


def _generate_drafted(
    model: CausalLM, prompt: _Prompt, output: Output, limit: int, stops: tuple[int, ...], draft: int
) -> Generation:
    """Rows keep different numbers of drafts and so drift apart; those that have ended run on, and are cut."""
    pending, cache, head_cache = output.logits.argmax(-1), output.cache, None
    hidden, mask, positions = output.hidden, prompt.mask, prompt.positions
    next_ids, embeddings = following(prompt.ids, pending, mask), prompt.embeddings
    if embeddings is not None:
        embeddings = following(embeddings, model.embed_tokens(pending), mask)
    rows: list[list[int]] = pending.tolist()
    drafted = accepted = 0
    while True:
        cut = [_cut(row, limit, stops) for row in rows]
        rooms = [0 if row[-1] in stops else limit - len(row) for row in cut]
        room, proposed = max(rooms), pending[:, :0]
        if not room:
            break
        if room > 1:
            drafts = draft_tokens(
                model,
                hidden,
                next_ids,
                min(draft, room - 1),
                attention_mask=mask,
                embeddings=embeddings,
                position_ids=positions,
                cache=head_cache,
            )
            proposed, head_cache = drafts.tokens, drafts.cache
        judged = judge(model, pending, proposed, cache)
        for row, left, chosen, count in zip(rows, rooms, judged.chosen.tolist(), judged.accepted.tolist(), strict=True):
            row.extend(chosen[: count + 1])
            if left:
                drafted, accepted = drafted + proposed.shape[1], accepted + count
        pending, cache = judged.chosen.gather(1, judged.accepted[:, None]), judged.cache
        hidden, next_ids, mask = judged.hidden, judged.chosen, judged.kept
        embeddings = positions = None
    width = max(len(row) for row in cut)
    new = torch.tensor(
        [row + row[-1:] * (width - len(row)) for row in cut], dtype=prompt.ids.dtype, device=prompt.ids.device
    )
    return Generation(tokens=torch.cat((prompt.ids, new), dim=1), drafted=drafted, accepted=accepted)


def _cut(row: list[int], limit: int, stops: tuple[int, ...]) -> list[int]:
    """The row up to its first stop token, and no longer than ``limit``."""
    ends = [n for n, token in enumerate(row[:limit], start=1) if token in stops]
    return row[: ends[0] if ends else limit]
