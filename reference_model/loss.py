"""What fine-tuning minimises: surprise at the next token, and a little for experts that share their work unevenly.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from reference_model.config import TextConfig
from reference_model.model import Output
from reference_model.moe import load_balancing_loss
from reference_model.norm import widen
from reference_model.span import check_places

UNSCORED = -100
"""Label of a token that nothing has to predict: padding, or a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageLoss:
    """Scalars in at least fp32: nats per scored token, the balancing loss, and ``next_token + coefficient balance``."""

    next_token: Tensor
    balance: Tensor
    total: Tensor


def language_loss(
    config: TextConfig, output: Output, labels: Tensor, attention_mask: Tensor | None = None
) -> LanguageLoss:
    """Score a forward over whole rows: ``total = next_token + router_aux_loss_coef balance``.

    Logits at t are scored by ``labels`` [B, T] at t + 1, unless that is ``UNSCORED``. Tokens that ``attention_mask``
    [B, T] hides predict nothing, and do not count as visitors of their experts.

    Raises:
        ValueError: labels are of another shape than the tokens or not of the vocabulary, or the mask does not fit them.
    """
    batch, tokens, size = output.logits.shape
    if labels.shape != (batch, tokens):
        raise ValueError(f"labels is {list(labels.shape)}, the logits are of {[batch, tokens]} tokens")
    beyond = labels[(labels != UNSCORED) & ((labels < 0) | (labels >= size))]
    if beyond.numel():
        raise ValueError(f"label {int(beyond[0])} is not of the vocabulary, 0 to {size - 1}, nor {UNSCORED}")
    check_places((batch, tokens), attention_mask)
    targets = labels[:, 1:]
    if attention_mask is not None:
        targets = targets.masked_fill(~attention_mask[:, :-1].bool(), UNSCORED)
    next_token = functional.cross_entropy(
        widen(output.logits[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=UNSCORED
    )
    balance = load_balancing_loss(output.router_logits, config.num_experts_per_tok, attention_mask)
    return LanguageLoss(
        next_token=next_token, balance=balance, total=next_token + config.router_aux_loss_coef * balance
    )
