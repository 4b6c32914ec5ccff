"""What the trained demo checkpoint is worth, in numbers and in the README of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibration.ngram import bigram_loss, unigram_loss
from calibration.windows import cut
from reference_model.model import CausalLM
from reference_model.train import cross_entropy, expert_shares

WINDOW = 512
"""Tokens that the model sees at once when it is measured; it was trained on 256."""


@torch.no_grad()
def measure(model: CausalLM, train: Tensor, held_out: Mapping[str, Tensor]) -> dict[str, Any]:
    """Held-out losses by domain and over all windows, drafts that the model agrees with, and shares of the experts.

    Args:
        model: trained, with the weights as they are stored.
        train: training tokens int64 [N], for the n-gram counts.
        held_out: tokens int64 [M] of each domain.
    """
    vocab = model.config.vocab_size
    windows = {domain: cut(tokens, min(WINDOW, len(tokens))) for domain, tokens in held_out.items()}
    domains: dict[str, dict[str, float]] = {}
    for domain, batch in windows.items():
        loss, draft_loss, accepted = _model_scores(model, batch)
        domains[domain] = {
            "tokens": batch.numel(),
            "unigram": round(unigram_loss(train, batch, vocab), 4),
            "bigram": round(bigram_loss(train, batch, vocab), 4),
            "model": round(loss, 4),
            "draft": round(draft_loss, 4),
            "draft_accepted": round(accepted, 4),
        }
    tokens = sum(scores["tokens"] for scores in domains.values())
    overall = {
        name: round(sum(scores[name] * scores["tokens"] for scores in domains.values()) / tokens, 4)
        for name in ("unigram", "bigram", "model", "draft", "draft_accepted")
    }
    shares = expert_shares(model, windows.values())
    return {
        "window": WINDOW,
        "held_out": {"tokens": tokens, **overall},
        "domains": domains,
        "expert_share": [
            {"min": round(float(layer.min()), 4), "max": round(float(layer.max()), 4)} for layer in shares
        ],
    }


def _model_scores(model: CausalLM, windows: Tensor) -> tuple[float, float, float]:
    """Nats a token, nats a drafted token, share of drafts that are the model's own first choice; windows [W, T].

    A draft from tokens up to t + 1 is accepted when the model, at t + 1, would choose the same token t + 2.
    """
    loss = draft_loss = accepted = 0.0
    for batch in torch.split(windows, 8):
        output = model(batch)
        drafted = model.head(model.draft(output.hidden[:, :-1], batch[:, 1:]).hidden)
        weight = len(batch) / len(windows)
        loss += weight * cross_entropy(output.logits[:, :-1], batch[:, 1:]).item()
        draft_loss += weight * cross_entropy(drafted[:, :-1], batch[:, 2:]).item()
        accepted += weight * (drafted.argmax(-1) == output.logits[:, 1:].argmax(-1)).double().mean().item()
    return loss, draft_loss, accepted


def readme(record: Mapping[str, Any]) -> str:
    """README of the checkpoint folder, from the content of ``training.json``."""
    measured, recipe, corpus = record["measured"], record["recipe"], record["corpus"]
    overall, versions = measured["held_out"], record["versions"]
    rows = [
        f"| {name} | {scores['tokens']:,} | {scores['unigram']:.2f} | {scores['bigram']:.2f} | {scores['model']:.2f} | "
        f"{scores['draft']:.2f} | {scores['draft_accepted']:.0%} |"
        for name, scores in (*measured["domains"].items(), ("**all**", overall))
    ]
    low = min(layer["min"] for layer in measured["expert_share"])
    high = max(layer["max"] for layer in measured["expert_share"])
    return _README.format(
        rows="\n".join(rows),
        low=f"{low:.1%}",
        high=f"{high:.1%}",
        megabytes=f"{record['tensor_bytes'] / 1e6:.1f}",
        million=f"{record['trained_tokens'] / 1e6:.2f}",
        steps=recipe["steps"],
        batch=recipe["batch"],
        window=recipe["window"],
        test_window=measured["window"],
        minutes=round(record["seconds"] / 60),
        sha=corpus["sha256"],
        corpus_tokens=f"{corpus['tokens'] / 1e6:.2f}",
        python=versions["python"],
        torch=versions["torch"],
        seed=record["seed"],
    )


_README = """\
---
license: apache-2.0
---

# Demo checkpoint

A small Qwen3.5-MoE that was trained on the project's own reference model, in the layout of a hub repository: nested
`config.json`, sharded safetensors, prefix `model.language_model.`, fused experts, a multi-token prediction head and a
vision tower. {megabytes} MB of tensors, BF16 but for `A_log` (FP32). It writes plausible Python and nothing more: it is
there to be converted, and to show on real text what a conversion costs.

Four layers (three linear attention, one full), 16 experts top-4 and a shared expert, hidden 384, experts of 128.
The **vision tower is not trained**: seeded random weights of a sensible scale, for loaders and converters.

## Held-out text

`heldout/` has five texts that training never saw, in nats per token, measured on the BF16 weights computed in FP32 in
windows of {test_window}. *Unigram* and *bigram* are counts over the training text. *Draft* is the multi-token
prediction head's loss on the token after the next: it is given the one in between and has a layer more than the model,
so its loss can be the lower one. A draft is *accepted* when the model itself would choose it.

| text | tokens | unigram | bigram | model | draft | accepted |
|---|---|---|---|---|---|---|
{rows}

Of all visits in a layer the least used expert gets {low} and the most used one {high} (even would be 6.2%).

The texts are parts of CPython's standard library and documentation, under the Python Software Foundation License
(`heldout/prose.txt` has its full text): module sources (`code`), docstrings, `pydoc` topics (`reference`), interfaces
of modules as JSON and INI written from their sources (`config`), the licence itself and `email/architecture.rst`
(`prose`).

## How it was made

`make demo-checkpoint` (`python -m calibration.demo`) repeats it: corpus from the standard library of Python {python}
({corpus_tokens} million tokens), a byte-level BPE of 2,048 tokens trained on it, then {steps} steps of {batch} windows
of {window} tokens ({million} million) with Muon and AdamW in FP32, seed {seed}, torch {torch}, {minutes} minutes on two
shared cores. `training.json` has every number. Another Python has another standard library: the script says so and
needs `--allow-other-corpus`.

Corpus SHA-256: `{sha}`
"""
