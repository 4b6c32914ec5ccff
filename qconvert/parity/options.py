"""What to compare, as the caller asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qconvert.parity.limits import Limit
from qconvert.parity.saved import KEPT
from qconvert.texts.documents import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """What to compare, on which tokens, within which limits.

    Attributes:
        texts: what both models read; without any the held-out texts that come along, or random tokens where the
            original has no tokenizer.
        tokens: tokens at most.
        window: tokens that see each other.
        limits: bounds of the verdict, see ``limits.py``; those of the model are applied to it as served.
        round_to: type through which dequantized matrices pass, as engines store them that way; ``None`` for float32.
        run_model: whether the models are run at all.
        layers: also compare each layer by itself, fed the original's inputs, and the states of DeltaNet layers.
        drafts: also run the prediction heads, where both models have one.
        greedy: prompts that both models continue greedily, 0 for none.
        greedy_tokens: tokens by which each is continued at most.
        explain: restore parts of the original, and tell what each is worth.
        budget: seconds for that; fewer layers are restored where they do not suffice.
        work: folder for the states after each layer, from which a run that was killed goes on.
        save_logprobs: file that takes the original's likeliest tokens, to be given instead of it later, see ``saved``.
        kept: how many of them for each position.
    """

    texts: tuple[Text, ...] = ()
    tokens: int = 10_240
    window: int = 512
    seed: int = 0
    limits: tuple[Limit, ...] = ()
    round_to: torch.dtype | None = None
    run_model: bool = True
    layers: bool = False
    drafts: bool = False
    greedy: int = 0
    greedy_tokens: int = 32
    explain: bool = False
    budget: float | None = None
    work: Path | None = None
    save_logprobs: Path | None = None
    kept: int = KEPT
