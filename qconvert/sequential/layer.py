"""One layer: its inputs are looked at, its matrices rounded and written, and its outputs go on.

Attention and delta rule come first, for their matrices decide what experts read. Experts are rounded several at once,
each on one thread, and what they give is added up in the order of their numbers: the bits depend on no thread.

Shapes: B windows, T tokens of a window, N tokens in all, D hidden, E experts, k experts a token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qconvert.arch.names import Naming, module_of, name_of
from qconvert.core.plan import Step
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.numerics.hessian import Moments, blended, factorize, no_moments
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.mlp import MlpInputs, Name, Shown, inner, round_mlp
from qconvert.sequential.ordered import in_order
from qconvert.sequential.places import LayerSteps, MlpSteps
from qconvert.sequential.rounder import Rounder, Way, to_nearest, with_feedback
from qconvert.weights.rows import RowStore
from qconvert.weights.source import CheckpointWeights
from reference_model.config import LayerType
from reference_model.layer import DecoderLayer, load_layer
from reference_model.layerwise import HiddenStates
from reference_model.load import ActivationStore
from reference_model.moe import Dispatch, Visits, dispatch
from reference_model.span import place_tokens

LAYER_TOKENS = 4
"""Tokens of the layer, as multiples of D, that experts of few tokens lean on; evenly over all of them."""

ROWS = 4096
"""Rows of an expert's inputs that are in float32 at once."""

_EXPERT_KINDS: dict[Name, Kind] = {"gate": Kind.EXPERT_GATE, "up": Kind.EXPERT_UP, "down": Kind.EXPERT_DOWN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """What all layers are worked on with.

    Attributes:
        weights: the source.
        pool: ``jobs`` threads.
        store: where hidden states wait.
        rows_bytes: what the inputs of a layer's experts, and again their outputs, may have in memory.
        folder: for the rest of them.
    """

    weights: CheckpointWeights
    rounder: Rounder
    calibration: Calibration
    pool: ThreadPoolExecutor
    jobs: int
    store: ActivationStore
    rows_bytes: int
    folder: Path | None = None

    def way(self, moments: Moments) -> tuple[Way, str]:
        """How matrices that read all tokens are rounded, and what that rests on."""
        hessian = blended(moments)
        if self.calibration.method != "gptq":
            return to_nearest(hessian), hessian.support.name.lower()
        factor = factorize(hessian, damping=self.calibration.damping)
        return with_feedback(factor), factor.support.name.lower()


@torch.no_grad()
def round_layer(
    shop: Shop, section: Section, number: int, steps: LayerSteps, hidden: HiddenStates, *, onward: bool
) -> None:
    """Round a layer of the decoder or of the prediction head, and replace ``hidden`` [B, T, D] by what it gives.

    Args:
        shop: what to work with.
        section: ``TEXT`` or ``MTP``.
        number: of the layer.
        steps: what to round; nothing is to pass it only.
        hidden: its inputs, which it takes.
        onward: whether its outputs are needed; they are not computed otherwise, and ``hidden`` is left as it is.
    """
    layer = _load(shop.weights, section, number)
    if steps.mixer or steps.mixed:
        _round_mixer(shop, layer, number, steps, hidden)
    config = shop.weights.config.text
    total = sum(hidden[b].shape[0] * hidden[b].shape[1] for b in range(len(hidden)))
    room = partial(RowStore, total, config.hidden_size, limit=shop.rows_bytes, folder=shop.folder)
    with room(torch.bfloat16) as inputs, room(torch.float32) as sums:
        visits = _mix(shop, layer, hidden, inputs)
        _round_experts(shop, section, number, steps, inputs, visits, sums if onward else None)
        if steps.shared:
            _round_shared(shop, layer, steps.shared, inputs, total)
        begin = 0
        for b in range(len(hidden)) if onward else ():
            mixed = shop.store.get(f"mixed.{b}")
            flat = layer.post_attention_layernorm(mixed).flatten(0, 1)
            routed = sums.rows(begin, begin + len(flat))
            hidden.put(b, mixed + layer.mlp.with_shared(flat, routed).view_as(mixed))
            begin += len(flat)
        for b in range(len(hidden)):
            shop.store.drop(f"mixed.{b}")


def _load(weights: CheckpointWeights, section: Section, number: int) -> DecoderLayer:
    config = weights.config.text
    kind: LayerType = config.layer_types[number] if section is Section.TEXT else "full_attention"
    block = "layers" if section is Section.TEXT else "mtp.layers"
    return load_layer(config, weights, f"{block}.{number}.", kind, torch.float32)


def _round_mixer(shop: Shop, layer: DecoderLayer, number: int, steps: LayerSteps, hidden: HiddenStates) -> None:
    """Round what reads the layer's input, then what reads the heads' outputs, as the layer gives them by then."""
    if steps.mixer:
        normed = _moments(shop, lambda b: layer.input_layernorm(hidden[b]).flatten(0, 1), len(hidden))
        _round_linear(shop, layer, number, steps.mixer, normed)
        del normed
    if not steps.mixed:
        return
    linear = layer.layer_type == "linear_attention"
    mixer, last = (
        (layer.linear_attn, layer.linear_attn.out_proj) if linear else (layer.self_attn, layer.self_attn.o_proj)
    )
    seen = threading.local()

    def remember(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.x = args[0]

    def mixed(b: int) -> Tensor:
        x = hidden[b]
        mixer(layer.input_layernorm(x), place_tokens(shop.weights.config.text, x))
        given: Tensor = seen.x
        return given.flatten(0, 1)

    watching = last.register_forward_pre_hook(remember)
    moments = _moments(shop, mixed, len(hidden))
    watching.remove()
    _round_linear(shop, layer, number, steps.mixed, moments)


def _moments(shop: Shop, inputs: Callable[[int], Tensor], batches: int) -> Moments:
    """Of ``inputs`` [N, K] of all batches."""
    found: Moments | None = None
    for rows in in_order(shop.pool, inputs, range(batches), shop.jobs):
        found = (no_moments(rows.shape[1]) if found is None else found).add(rows)
    return no_moments(0) if found is None else found


def _round_linear(shop: Shop, layer: DecoderLayer, number: int, steps: Sequence[Step], moments: Moments) -> None:
    way, support = shop.way(moments)
    wanted = shop.calibration.propagate

    def rounded(step: Step) -> Tensor:
        return shop.rounder.round(step, way, moments.tokens, support, wanted=wanted)

    for step, meaning in zip(steps, in_order(shop.pool, rounded, steps, shop.jobs), strict=True):
        if wanted:
            module = module_of(name_of(step.role, Naming.TEXT)).partition(f"layers.{number}.")[2]
            _replace(layer.get_submodule(module), meaning)


def _replace(linear: nn.Module, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight, requires_grad=False)


def _mix(shop: Shop, layer: DecoderLayer, hidden: HiddenStates, inputs: RowStore) -> Visits:
    """The first half of the layer: what it gives waits as ``mixed``, what experts read in ``inputs`` [N, D]."""

    def enter(b: int) -> tuple[Tensor, Tensor, Visits]:
        x = hidden[b]
        mixed, _ = layer.mix(x, place_tokens(shop.weights.config.text, x))
        flat = layer.post_attention_layernorm(mixed).flatten(0, 1)
        return mixed, flat, layer.mlp.visits(flat, layer.mlp.gate(flat))

    experts, weights, begin = [], [], 0
    for b, (mixed, flat, visits) in enumerate(in_order(shop.pool, enter, range(len(hidden)), shop.jobs)):
        shop.store.put(f"mixed.{b}", mixed)
        inputs.put(begin, flat)
        begin += len(flat)
        experts.append(visits.experts)
        weights.append(visits.weights)
    return Visits(experts=torch.cat(experts), weights=torch.cat(weights))


def _round_experts(
    shop: Shop,
    section: Section,
    number: int,
    steps: LayerSteps,
    inputs: RowStore,
    visits: Visits,
    sums: RowStore | None,
) -> None:
    """Round the routed experts, and add what they give, times its weight, to ``sums`` [N, D]."""
    config = shop.weights.config.text
    total, width = len(visits.experts), config.hidden_size
    where = dispatch(visits.experts, config.stored_experts)
    ends = torch.tensor(where.counts).cumsum(0).tolist()
    layer = sample = None
    if steps.experts:
        layer = no_moments(width)
        for at in torch.split(_evenly(total, LAYER_TOKENS * width), ROWS):
            layer = layer.add(inputs.gather(at))
        sample = inputs.gather(_evenly(total, config.moe_intermediate_size))

    def visitors(e: int) -> tuple[Tensor, Tensor]:
        at, slot = (part[ends[e] - where.counts[e] : ends[e]] for part in (where.token, where.slot))
        return at, visits.weights[at, slot]

    def expert(e: int) -> Shown:
        at, weights = visitors(e)
        counts = _with_mean_square_one(weights)

        def runs() -> Iterator[tuple[Tensor, Tensor]]:
            cut = zip(torch.split(at, ROWS), torch.split(counts, ROWS), strict=True)
            return ((inputs.gather(some), count) for some, count in cut if len(some))

        def original(name: Name) -> Tensor:
            return shop.weights.matrix(TensorRole(section=section, kind=_EXPERT_KINDS[name], layer=number, expert=e))

        wanted = steps.experts.get(e) or MlpSteps()
        reads = MlpInputs(width=width, runs=runs, layer=layer, sample=sample)
        return round_mlp(wanted, original, reads, shop.rounder, shop.calibration)

    reached = _reached(where, steps)
    for e, shown in zip(reached, in_order(shop.pool, expert, reached, shop.jobs), strict=True):
        if sums is not None:
            _pass_on(shop, shown, *visitors(e), inputs, sums)


def _pass_on(shop: Shop, shown: Shown, at: Tensor, weights: Tensor, inputs: RowStore, sums: RowStore) -> None:
    """Add what an expert gives its tokens ``at`` [R], times ``weights`` [R], ``ROWS`` of them at a time."""
    expert = shown.weights

    def given(begin: int) -> Tensor:
        between = shown.inner
        if between is None:
            between = inner(inputs.gather(at[begin : begin + ROWS]), expert.gate, expert.up)
        return (between @ expert.down.T).mul_(weights[begin : begin + ROWS, None])

    starts = range(0, len(at), ROWS)
    for begin, rows in zip(starts, in_order(shop.pool, given, starts, shop.jobs), strict=True):
        sums.add(at[begin : begin + ROWS], rows)


def _reached(where: Dispatch, steps: LayerSteps) -> list[int]:
    """Experts that have tokens, or something to be rounded."""
    return [e for e, count in enumerate(where.counts) if count or e in steps.experts]


def _round_shared(shop: Shop, layer: DecoderLayer, steps: MlpSteps, inputs: RowStore, total: int) -> None:
    """Round the shared expert, which every token visits."""
    shared = layer.mlp.shared_expert
    if shared is None:
        return
    linears = {"gate": shared.gate_proj, "up": shared.up_proj, "down": shared.down_proj}

    def share(rows: Tensor) -> Tensor:
        return torch.sigmoid(layer.mlp.shared_expert_gate(rows.to(torch.float32))).flatten()

    def chunks() -> Iterator[Tensor]:
        return (inputs.rows(begin, min(begin + ROWS, total)) for begin in range(0, total, ROWS))

    size = torch.stack([share(rows).square().sum() for rows in chunks()]).sum() / total

    def runs() -> Iterator[tuple[Tensor, Tensor]]:
        return ((rows, share(rows) / size.sqrt()) for rows in chunks())

    reads = MlpInputs(width=shared.gate_proj.in_features, runs=runs)
    shown = round_mlp(steps, lambda name: linears[name].weight.detach(), reads, shop.rounder, shop.calibration)
    for name, linear in linears.items():
        _replace(linear, getattr(shown.weights, name))


def _with_mean_square_one(weights: Tensor) -> Tensor:
    return weights / weights.square().mean().sqrt().clamp(min=1e-30)


def _evenly(total: int, count: int) -> Tensor:
    """At most ``count`` of ``total`` numbers, evenly apart, ascending."""
    count = min(total, count)
    return torch.arange(count).mul_(total).div_(count, rounding_mode="floor")
