"""Training: what a batch costs, Muon for the matrices, AdamW for the rest, and the loop.

Shapes: B windows, T tokens a window, D hidden, E experts, F intermediate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reference_model.model import CausalLM
from reference_model.moe import load_balancing_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        steps: batches in all; the rates reach zero after the last one.
        warmup: steps over which the rates rise from zero.
        decay: last steps, over which the rates fall linearly to zero.
        matrix_rate: Muon's step, in units of a matrix of orthonormal rows.
        embedding_rate: AdamW's rate for the embedding; likewise ``head_rate`` and ``other_rate``.
        draft_weight: weight of the multi-token prediction loss (0.3 in DeepSeek-V3, arXiv 2412.19437).
        balance_weight: weight of each layer's load-balancing loss.
    """

    steps: int
    decay: int
    warmup: int = 20
    matrix_rate: float = 0.02
    embedding_rate: float = 0.1
    head_rate: float = 0.004
    other_rate: float = 0.004
    draft_weight: float = 0.3
    balance_weight: float = 0.005

    def rate(self, step: int) -> float:
        """Factor on all rates at ``step`` (from 0): up over ``warmup``, flat, down to zero at ``steps``."""
        rising = (step + 1) / max(self.warmup, 1)
        falling = (self.steps - step) / max(self.decay, 1)
        return min(1.0, rising, falling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Scalars of one batch: nats per token, nats per drafted token, and the layers' mean balancing loss."""

    next_token: Tensor
    draft: Tensor
    balance: Tensor

    def total(self, recipe: Recipe) -> Tensor:
        """What is minimised."""
        return self.next_token + recipe.draft_weight * self.draft + recipe.balance_weight * self.balance


def losses(model: CausalLM, windows: Tensor) -> Losses:
    """Run int64 windows [B, T] and score token t + 1 from the head and t + 2 from the prediction head.

    The prediction head is skipped, and its loss zero, when the model has none.
    """
    output = model(windows)
    routings = list(output.routings)
    next_token = cross_entropy(output.logits[:, :-1], windows[:, 1:])
    draft = next_token.new_zeros(())
    if model.config.mtp_num_hidden_layers:
        drafted = model.draft(output.hidden[:, :-1], windows[:, 1:])
        routings += drafted.routings
        draft = cross_entropy(model.head(drafted.hidden[:, :-1]), windows[:, 2:])
    # Layer by layer: over all layers at once, one layer's idle expert would hide behind another's busy one.
    top_k = model.config.num_experts_per_tok
    balance = torch.stack([load_balancing_loss([routing.logits], top_k) for routing in routings]).mean()
    return Losses(next_token=next_token, draft=draft, balance=balance)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of ``-log softmax(logits)[target]``, in nats; logits [B, T, V], targets [B, T]."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def start(model: CausalLM, seed: int) -> None:
    """Set the weights that training begins with, the same for the same seed.

    Every sublayer starts as zero: its last matrix is zero, the others have deviation 1 / sqrt(inputs). Embeddings
    have deviation 1, the head and the routers 0.02. ``exp(A_log)`` is uniform in (1, 16) and ``softplus(dt_bias)``
    log-uniform in (0.001, 0.1), as in Mamba (arXiv 2312.00752), so that heads remember for 1 to 1000 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if leaf == "A_log":
                weight.uniform_(1.0, 16.0, generator=generator).log_()
            elif leaf == "dt_bias":
                weight.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
                weight.copy_(weight + torch.log(-torch.expm1(-weight)))  # the inverse of softplus
            elif "norm" in module.rpartition(".")[2]:
                weight.fill_(1.0 if module.endswith("linear_attn.norm") else 0.0)
            elif module.endswith("conv1d"):
                bound = weight.shape[-1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            elif module == "embed_tokens":
                weight.normal_(0.0, 1.0, generator=generator)
            elif module == "lm_head" or module.endswith("mlp.gate"):
                weight.normal_(0.0, 0.02, generator=generator)
            elif module.endswith(("out_proj", "o_proj", "down_proj")) or leaf == "down_proj":
                weight.zero_()
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)


QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: Tensor, rounds: int = 5) -> Tensor:
    """Bring every singular value of x [..., M, N] near one, keeping its singular vectors.

    ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, started from X / ||X||_F (Jordan et al. 2024, "Muon: an optimizer
    for hidden layers in neural networks"); the shorter side is made the rows. Singular values end in about
    (0.7, 1.2): the coefficients trade exactness for speed. A zero matrix stays zero.
    """
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, matrix by matrix.

    ``m <- mu m + (1 - mu) g``; ``W <- W - rate sqrt(max(1, M / N)) orthogonalize((1 - mu) g + mu m)``, W [..., M, N].
    A stack of experts is a batch of matrices; rows that hold ``parts`` matrices one above the other are taken apart.
    """

    def __init__(self, groups: list[dict[str, Any]], rate: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": rate, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(state["momentum"], group["momentum"])
                ahead = ahead.unflatten(-2, (group["parts"], -1))
                scale = math.sqrt(max(1.0, ahead.shape[-2] / ahead.shape[-1]))
                update = orthogonalize(ahead).flatten(-3, -2)
                weight.add_(update, alpha=-group["lr"] * scale)


def optimizers(model: CausalLM, recipe: Recipe, workers: int = 1) -> list[list[torch.optim.Optimizer]]:
    """Muon for the matrices inside the layers; AdamW for embedding, head, norms, convolutions, routers and gates.

    Gives every worker its own pair, over its share of the parameters.
    """
    largest_first = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    shares: list[list[torch.optim.Optimizer]] = []
    for worker in range(workers):
        groups: dict[str, list[Tensor]] = {"matrices": [], "stacked": [], "embedding": [], "head": [], "others": []}
        for name, weight in largest_first[worker::workers]:
            groups[_group_of(name, weight)].append(weight)
        muon = Muon(
            [{"params": groups["matrices"]}, {"params": groups["stacked"], "parts": 2}],
            recipe.matrix_rate,
        )
        adam = torch.optim.AdamW(
            [
                {"params": groups["embedding"], "lr": recipe.embedding_rate},
                {"params": groups["head"], "lr": recipe.head_rate},
                {"params": groups["others"], "lr": recipe.other_rate},
            ],
            betas=(0.8, 0.95),
            eps=1e-10,
            weight_decay=0.0,
        )
        for group in (*muon.param_groups, *adam.param_groups):
            group["full_rate"] = group["lr"]
        shares.append([muon, adam])
    return shares


def _group_of(name: str, weight: Tensor) -> str:
    if name == "embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if name.endswith("gate_up_proj"):
        return "stacked"
    return "others" if weight.ndim < 2 or name.endswith(_SMALL) else "matrices"


_SMALL = (
    "mlp.gate.weight",
    "shared_expert_gate.weight",
    "in_proj_a.weight",
    "in_proj_b.weight",
    "conv1d.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Losses of step ``step`` (from 0), before its update, and what a later ``train`` needs to go on after it."""

    step: int
    next_token: float
    draft: float
    balance: float
    state: Callable[[], dict[str, Any]]


def train(
    model: CausalLM,
    batches: Iterable[Tensor],
    recipe: Recipe,
    *,
    workers: int = 1,
    resume: dict[str, Any] | None = None,
) -> Iterator[StepReport]:
    """Update ``model`` once for each batch of windows [B, T]; yields after every step.

    The caller draws the steps: it may log, save ``report.state()``, or stop. To go on from a saved state pass it as
    ``resume`` together with the batches that follow it and the same number of workers.

    Workers are threads that share the weights and take B / workers windows each. With ``torch.set_num_threads(1)`` they
    need each other twice a step; threads inside every product wait for each other a thousand times, which costs 20-fold
    when something else wants the processor.

    Raises:
        ValueError: the windows of a batch cannot be shared out evenly.
        RuntimeError: a loss is not finite.
    """
    replicas = [model, *(_sharing_weights(model) for _ in range(workers - 1))]
    shares = optimizers(model, recipe, workers)
    flat = [optimizer for share in shares for optimizer in share]
    first = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        for optimizer, saved in zip(flat, resume["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = resume["step"] + 1

    def gradients(replica: CausalLM, windows: Tensor) -> tuple[float, float, float]:
        batch = losses(replica, windows)
        batch.total(recipe).backward()  # type: ignore[no-untyped-call]
        return batch.next_token.item(), batch.draft.item(), batch.balance.item()

    names = [name for name, _ in model.named_parameters()]
    copies = [dict(replica.named_parameters()) for replica in replicas]
    owner = {weight: worker for worker, share in enumerate(shares) for o in share for g in o.param_groups
             for weight in g["params"]}  # fmt: skip

    def update(worker: int) -> None:
        for name in names:
            weight = copies[0][name]
            if owner[weight] == worker:
                total = torch.zeros_like(weight)
                for twin in copies:
                    gradient = twin[name].grad
                    if gradient is not None:
                        total += gradient
                weight.grad = total / workers
        for optimizer in shares[worker]:
            optimizer.step()

    with ThreadPoolExecutor(workers) as pool:
        for step, windows in zip(range(first, recipe.steps), batches, strict=False):
            if windows.shape[0] % workers:
                raise ValueError(f"{windows.shape[0]} windows cannot be shared out to {workers} workers")
            for optimizer in flat:
                for group in optimizer.param_groups:
                    group["lr"] = group["full_rate"] * recipe.rate(step)
            parts = list(pool.map(gradients, replicas, windows.chunk(workers)))
            means = [sum(values) / workers for values in zip(*parts, strict=True)]
            if not all(map(math.isfinite, means)):
                raise RuntimeError(f"the losses of step {step} are {means}; lower the rates of the recipe")
            list(pool.map(update, range(workers)))
            for replica in replicas:
                replica.zero_grad(set_to_none=True)

            def state(at: int = step) -> dict[str, Any]:
                return {"model": model.state_dict(), "optimizers": [o.state_dict() for o in flat], "step": at}

            yield StepReport(step=step, next_token=means[0], draft=means[1], balance=means[2], state=state)


def _sharing_weights(model: CausalLM) -> CausalLM:
    """A second module on the same storage, with gradients of its own."""
    replica = copy.deepcopy(model)
    for mine, its in zip(model.parameters(), replica.parameters(), strict=True):
        its.data = mine.data
    return replica


def expert_shares(model: CausalLM, windows: Iterable[Tensor]) -> Tensor:
    """Share of all visits that goes to each expert [layers, E], rows summing to one; the decoder's layers only."""
    config = model.config
    visits = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    with torch.no_grad():
        for batch in windows:
            for layer, routing in enumerate(model(batch).routings):
                visits[layer] += torch.bincount(routing.experts.flatten(), minlength=config.num_experts)
    return visits / visits.sum(-1, keepdim=True)
