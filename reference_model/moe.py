"""Mixture of experts: a router sends each token to a few of many small MLPs; one shared MLP sees every token.

Shapes: T tokens, D hidden, E experts, k experts a token, F width of an expert, R = T k rows (a token once per expert
that it visits). A shared expert may be stored as n further experts, which every token visits: E + n and k + n then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_model.config import TextConfig
from reference_model.norm import widen

FEW_ROWS = 64
"""Tokens up to which an expert's products are made with tokens as columns; see ``few_rows_linear``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where the router sends tokens. ``logits`` [T, E]; ``experts`` int64 [T, k], likeliest first; ``weights`` [T, k].

    Weights sum to one. Folded experts are not the router's to choose, and do not count here.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """The experts that each token visits, ``experts`` int64 [T, k], and what their outputs count, ``weights`` [T, k].

    Of a block with a folded shared expert these are the router's choices and, behind them, the n that are always on.
    """

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Rows sorted by expert. ``token`` and ``slot`` int64 [R]: row r is slot ``slot[r]`` of token ``token[r]``.

    ``counts`` has one entry an expert: the rows of expert e follow those of expert e - 1.
    """

    token: Tensor
    slot: Tensor
    counts: list[int]


class Router(nn.Module):
    """Scores every expert and keeps the best k.

    ``p = softmax(x weight^T)`` over all E in at least fp32; weights are the k largest p divided by their sum, cast to
    the dtype of the logits. weight [E, D].
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> Routing:
        """Route x [T, D]."""
        logits = functional.linear(x, self.weight)
        best, experts = widen(logits).softmax(-1).topk(self.top_k, dim=-1)
        weights = (best / best.sum(-1, keepdim=True)).to(logits.dtype)
        return Routing(logits=logits, experts=experts, weights=weights)


def dispatch(experts: Tensor, num_experts: int) -> Dispatch:
    """Sort the rows of ``experts`` [T, k] by expert, and by token within an expert."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    return Dispatch(
        token=order.div(experts.shape[1], rounding_mode="floor"),
        slot=order.remainder(experts.shape[1]),
        counts=counts.tolist(),
    )


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    round_x: Callable[[Tensor], Tensor] | None = None,
    round_inner: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``(silu(x gate^T) * (x up^T)) down^T``; x [rows, D], gate_up [2F, D] gate rows first, down [D, F].

    ``round_x`` and ``round_inner`` stand for engines that round the inputs of gate_up and of down.
    """
    gate, up = few_rows_linear(x if round_x is None else round_x(x), gate_up).chunk(2, dim=-1)
    inner = functional.silu(gate) * up
    return few_rows_linear(inner if round_inner is None else round_inner(inner), down)


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` for the handful of tokens that an expert gets; x [rows, K], weight [N, K], result [rows, N].

    In fp32 a CPU with AVX2 takes less time for some tens of tokens with these as columns, in whole vector registers:
    they are filled up with zeros to a multiple of 8. For fewer, for more and in other types it takes more.
    """
    rows = x.shape[0]
    if x.dtype != torch.float32 or not 8 < rows <= FEW_ROWS:
        return functional.linear(x, weight)
    filled = functional.pad(x, (0, 0, 0, -rows % 8))
    return (weight @ filled.t()).t()[:rows]


def combine(rows: Tensor, where: Dispatch, weights: Tensor) -> Tensor:
    """Sum the rows [R, D] of each token, times its ``weights`` [T, k], in ascending order of expert: [T, D]."""
    weighted = rows * weights[where.token, where.slot].unsqueeze(-1)
    return rows.new_zeros(weights.shape[0], rows.shape[1]).index_add(0, where.token, weighted)


class Experts(nn.Module):
    """The experts: ``gate_up_proj`` [E, 2F, D], gate rows first, and ``down_proj`` [E, D, F]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, width, hidden = config.stored_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        nn.init.normal_(self.gate_up_proj, std=config.initializer_range)
        nn.init.normal_(self.down_proj, std=config.initializer_range)

    def forward(self, x: Tensor, visits: Visits) -> Tensor:
        """``sum_s weights[t, s] * expert_mlp(x_t, expert[t, s])`` for x [T, D]; experts without tokens are not run."""
        where = dispatch(visits.experts, self.gate_up_proj.shape[0])
        # unbind and split, not indexing: their backward is one stack, where an index writes E full-size gradients
        parts = zip(
            torch.split(x.index_select(0, where.token), where.counts),
            self.gate_up_proj.unbind(),
            self.down_proj.unbind(),
            strict=True,
        )
        rows = [expert_mlp(part, gate_up, down) for part, gate_up, down in parts if part.shape[0]]
        return combine(torch.cat(rows), where, visits.weights)


class SharedExpert(nn.Module):
    """The MLP that every token visits: ``down_proj(silu(gate_proj x) * up_proj x)``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.shared_expert_intermediate_size
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SparseMoe(nn.Module):
    """``experts(x) + sigmoid(shared_expert_gate x) * shared_expert(x)``; shared_expert_gate [1, D].

    A folded shared expert is no module: its units are those of the last n of the experts, which every token visits
    with the weight sigmoid(shared_expert_gate x). SwiGLU is a sum over units, so the sum of all n is the shared expert.
    The router knows the E others only.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.folded = range(config.num_experts, config.stored_experts)
        self.shared_expert = None if self.folded else SharedExpert(config)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def visits(self, x: Tensor, routing: Routing) -> Visits:
        """Which experts run for x [T, D], and what they count."""
        if not self.folded:
            return Visits(experts=routing.experts, weights=routing.weights)
        always = torch.tensor(self.folded, device=x.device).expand(x.shape[0], -1)
        share = torch.sigmoid(self.shared_expert_gate(x)).expand(-1, len(self.folded))
        return Visits(
            experts=torch.cat((routing.experts, always), dim=-1), weights=torch.cat((routing.weights, share), dim=-1)
        )

    def shared(self, x: Tensor) -> Tensor | None:
        """The gated shared expert's part for x [T, D], the same shape; ``None`` where experts hold it folded."""
        if self.shared_expert is None:
            return None
        out: Tensor = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out

    def with_shared(self, x: Tensor, experts: Tensor) -> Tensor:
        """What the experts gave for x [T, D], and the shared expert's part: [T, D]."""
        shared = self.shared(x)
        return experts if shared is None else experts + shared

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Run x [..., D] token by token; also says where the router sent the tokens."""
        flat = x.reshape(-1, x.shape[-1])
        routing: Routing = self.gate(flat)
        routed = self.experts(flat, self.visits(flat, routing))
        return self.with_shared(flat, routed).view_as(x), routing


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """How unevenly tokens are spread: E for all on one expert, about k when spread evenly.

    ``E * sum_e f_e P_e`` over all layers' tokens together: f_e is the number of visits to expert e per token, P_e the
    mean probability that the router gives it. Only P carries a gradient (Fedus, Zoph and Shazeer 2021, arXiv
    2101.03961, equations 4 to 6; here for k visits a token). ``router_logits`` [T, E] a layer; scalar, at least fp32.
    Tokens where ``attention_mask`` (T numbers in any shape) is zero do not count.
    """
    if attention_mask is not None:
        real = attention_mask.flatten().bool()
        router_logits = [logits[real] for logits in router_logits]
    probabilities = widen(torch.cat(tuple(router_logits))).softmax(-1)
    tokens, experts = probabilities.shape
    visits = torch.bincount(probabilities.topk(top_k, dim=-1).indices.flatten(), minlength=experts)
    return experts * (visits.to(probabilities.dtype) / tokens * probabilities.mean(0)).sum()
