"""Losses and their gradients equal those of transformers, with and without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference_model.loss import UNSCORED, language_loss
from reference_model.moe import load_balancing_loss
from tests.reference_model import tiny, upstream
from tests.reference_model.test_padding import padded
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")
COEFFICIENT = 0.3
"""Large enough to be seen beside the surprise."""


def batch(side: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, mask and labels [B, T]."""
    if side == "none":
        ids = tiny.tokens(2, 30)
        return ids, None, ids
    piece = padded([tiny.tokens(1, length, seed=length)[0] for length in (5, 30, 17)], side)
    assert piece.mask is not None
    return piece.ids, piece.mask, piece.ids.masked_fill(~piece.mask, UNSCORED)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_both_losses_and_the_routers_gradients_equal_those_of_transformers(side: str) -> None:
    changes = {"router_aux_loss_coef": COEFFICIENT}
    ids, mask, labels = batch(side)
    tensors = tiny.checkpoint(**changes)
    ours = tiny.model(tensors, **changes).requires_grad_()
    theirs = upstream.build(tiny.config_json(**changes), tensors).requires_grad_()
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    scored = labels.clone()
    if mask is not None:  # transformers would let the last padding on the left predict the first token
        scored[:, 1:].masked_fill_(~mask[:, :-1], UNSCORED)
    expected = theirs(ids, attention_mask=mask, position_ids=positions, labels=scored, output_router_logits=True)
    got = language_loss(ours.config, ours(ids, attention_mask=mask), labels, mask)
    assert got.balance.item() == pytest.approx(expected.aux_loss.item(), rel=LIMITS["balancing_loss"])
    assert got.total.item() == pytest.approx(expected.loss.item(), rel=LIMITS["balancing_loss"])
    assert got.total.item() == pytest.approx(got.next_token.item() + COEFFICIENT * got.balance.item())
    got.total.backward()
    expected.loss.backward()
    for mine, other in zip(ours.layers, theirs.model.layers, strict=True):
        gradient, wanted = mine.mlp.gate.weight.grad, other.mlp.gate.weight.grad
        assert (gradient - wanted).abs().max() <= LIMITS["router_gradient"] * wanted.abs().max()


def test_padding_visits_no_expert() -> None:
    """Logits at padding are as good as any: only the mask keeps them out."""
    logits = [torch.randn(6, 7, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    kept = [layer[[0, 2, 4, 5]] for layer in logits]
    assert torch.equal(load_balancing_loss(logits, 3, mask), load_balancing_loss(kept, 3))
    assert not torch.equal(load_balancing_loss(logits, 3, mask), load_balancing_loss(logits, 3))


def test_labels_and_masks_that_do_not_fit_are_named() -> None:
    ids = tiny.tokens(2, 5)
    model = tiny.model(tiny.checkpoint())
    output = model(ids)
    with pytest.raises(ValueError, match=r"labels is \[2, 4\], the logits are of \[2, 5\] tokens"):
        language_loss(model.config, output, ids[:, 1:])
    with pytest.raises(ValueError, match="label 417 is not of the vocabulary, 0 to 415, nor -100"):
        language_loss(model.config, output, ids.masked_fill(ids == ids[0, 1], 417))
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 6\], expected \[2, 5\]"):
        language_loss(model.config, output, ids, torch.ones(2, 6))
