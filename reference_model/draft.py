"""Drafting: the prediction head guesses a few tokens, the model judges all of them in one forward.

    cache: x_0 .. x_{n-1}    hidden: h_{n-1}    pending: x_n, chosen but not run

    draft   (h_{n-1}, x_n) -> d_1,  (its hidden, d_1) -> d_2,  ...  d_k
    judge   run x_n d_1 .. d_k: the model's own choice after each is y_0 .. y_k
    keep    the d_i that equal y_{i-1}, up to the first that does not, and the y after them: the next pending token

so that the tokens are those that the model chooses alone, in fewer forwards (Leviathan, Kalman and Matias 2022,
arXiv 2211.17192, for greedy choice). Rejected tokens leave by rewinding the cache. What the head remembers of its own
guesses is forgotten as well: the next draft begins by telling it the model's hidden states of the tokens that stayed.

Shapes: B batch, T tokens, k drafted tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference_model.cache import Cache
from reference_model.model import CausalLM
from reference_model.span import last_real, pack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """What the prediction head guesses.

    Attributes:
        tokens: int64 [B, k], its greedy choices.
        logits: [B, k, V], from which they were chosen.
        hidden: [B, k, D], the head's outputs that gave them.
        cache: of the head, with the tokens that it was told and none of its guesses.
    """

    tokens: Tensor
    logits: Tensor
    hidden: Tensor
    cache: Cache


@torch.no_grad()
def draft_tokens(
    model: CausalLM,
    hidden: Tensor,
    next_ids: Tensor,
    count: int,
    *,
    attention_mask: Tensor | None = None,
    embeddings: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> Drafts:
    """Guess the ``count`` >= 1 tokens that follow the last of ``next_ids``; the rest as in ``CausalLM.draft``."""
    if count < 1:
        raise ValueError(f"count is {count}, expected at least one token to guess")
    told = model.draft(
        hidden,
        next_ids,
        attention_mask=attention_mask,
        embeddings=embeddings,
        position_ids=position_ids,
        cache=cache,
    )
    state, guessing = last_real(told.hidden, attention_mask), told.cache
    states, logits, tokens = [state], [model.head(state)], []
    for _ in range(count - 1):
        tokens.append(logits[-1].argmax(-1))
        guess = model.draft(states[-1], tokens[-1], cache=guessing)
        guessing = guess.cache
        states.append(guess.hidden)
        logits.append(model.head(guess.hidden))
    tokens.append(logits[-1].argmax(-1))
    return Drafts(
        tokens=torch.cat(tokens, dim=1),
        logits=torch.cat(logits, dim=1),
        hidden=torch.cat(states, dim=1),
        cache=told.cache,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the model makes of k drafted tokens.

    Attributes:
        chosen: int64 [B, k + 1], its own choice after the pending token and after each draft. The first
            ``accepted[b] + 1`` of a row are new tokens, the last of these pending.
        accepted: int64 [B], how many drafts it would have chosen itself, from the first on.
        hidden: [B, k + 1, D] of the pending token and the drafts.
        cache: of all tokens but the one that is now pending.
    """

    chosen: Tensor
    accepted: Tensor
    hidden: Tensor
    cache: Cache

    @property
    def kept(self) -> Tensor:
        """Which of the k + 1 tokens were kept, and so which of ``hidden`` and ``chosen`` to draft from: bool."""
        return torch.arange(self.chosen.shape[1], device=self.chosen.device) <= self.accepted[:, None]


@torch.no_grad()
def judge(model: CausalLM, pending: Tensor, drafts: Tensor, cache: Cache) -> Judgement:
    """Run ``pending`` [B, 1] and ``drafts`` [B, k], k >= 0; go back to the first that the model would not choose."""
    output = model(torch.cat((pending, drafts), dim=1), cache=cache, rewindable=True)
    chosen = output.logits.argmax(-1)
    accepted = (chosen[:, :-1] == drafts).cumprod(1).sum(1)
    return Judgement(
        chosen=chosen,
        accepted=accepted,
        hidden=output.hidden,
        cache=output.cache.rewind(cache.lengths + 1 + accepted),
    )


def following(x: Tensor, last: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What comes after each real token of its row of x [B, T, ...]; ``last`` [B, 1, ...] after its last one."""
    if attention_mask is None:
        return torch.cat((x[:, 1:], last), dim=1)
    packing = pack_rows(attention_mask.bool())
    packed = torch.cat((packing.pack(x)[:, 1:], last), dim=1)
    packed[torch.arange(len(x)), packing.counts - 1] = last[:, 0]
    return packing.unpack(packed)
