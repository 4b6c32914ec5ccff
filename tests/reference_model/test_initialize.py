"""What training starts from."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from reference_model.model import CausalLM, initialize
from reference_model.moe import load_balancing_loss
from tests.reference_model import tiny


def started(seed: int = 0) -> CausalLM:
    model = CausalLM(tiny.text_config())
    initialize(model, seed)
    return model


def test_a_seed_fixes_every_weight() -> None:
    one, same, other = started().state_dict(), started().state_dict(), started(1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.linear_attn.A_log"], other["layers.0.linear_attn.A_log"])


def test_weights_start_where_they_should() -> None:
    state = started().state_dict()
    for name, weight in state.items():
        if name.endswith("linear_attn.norm.weight"):
            assert bool((weight == 1).all()), name
        elif "norm" in name:
            assert not weight.any(), name
        elif weight.ndim > 1 and "conv1d" not in name:
            assert 0.015 < float(weight.std()) < 0.025, name
    for decay in (weight for name, weight in state.items() if name.endswith("A_log")):
        assert bool(((decay > math.log(0.01)) & (decay < math.log(16))).all())


def test_every_weight_is_trained_by_the_losses() -> None:
    model = started()
    ids = tiny.tokens(4, 40)
    output = model(ids)
    drafted = model.draft(output.hidden[:, :-1], ids[:, 1:])
    losses = (
        functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
        functional.cross_entropy(model.head(drafted.hidden[:, :-1]).flatten(0, 1), ids[:, 2:].flatten()),
        load_balancing_loss((*output.router_logits, *(r.logits for r in drafted.routings)), 3),
    )
    assert abs(float(losses[0].detach()) - math.log(model.config.vocab_size)) < 0.5
    torch.stack(losses).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.isfinite().all()), name
        assert bool(weight.grad.any()), name
