"""Training reaches every weight."""

from __future__ import annotations

import torch
from torch.nn import functional

from reference_model.moe import load_balancing_loss
from tests.reference_model import tiny


def test_every_weight_is_trained_by_the_losses() -> None:
    model = tiny.model(tiny.checkpoint()).requires_grad_(True)
    ids = tiny.tokens(4, 40)
    output = model(ids)
    drafted = model.draft(output.hidden[:, :-1], ids[:, 1:])
    losses = (
        functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        functional.cross_entropy(model.head(drafted.hidden[:, :-1]).flatten(0, 1), ids[:, 2:].flatten()),
        load_balancing_loss((*output.router_logits, *(r.logits for r in drafted.routings)), 3),
    )
    torch.stack(losses).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.isfinite().all()), name
        assert bool(weight.grad.any()), name
