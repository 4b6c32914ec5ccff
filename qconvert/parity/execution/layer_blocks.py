"""The blocks of one layer, each compared with the reference on what the engine fed it, and named where it differs.

Shapes: B rows, T tokens, D hidden, E experts, R rows that are no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qconvert.core.metric import Metric, exact
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.parity.causes import Cause, CauseKind, cause
from qconvert.parity.execution.agreement import Agreement, Told, compare_block
from qconvert.parity.execution.experts import ExpertLayer
from qconvert.parity.execution.known import ATTENTION, EXPERTS, LINEAR, Known
from qconvert.parity.execution.mixers import RIGHT, Broken, Placed, attention, linear_attention
from qconvert.parity.execution.recorded import HIDDEN, MIXER, MOE, ROUTER, Recorded
from qconvert.weights.source import CheckpointWeights
from reference_model.layer import DecoderLayer
from reference_model.norm import RMSNorm, rms_normalize

SUM = "sum"

TIE = 4.0
"""So many roundings of the largest logit may lie between two experts that another rounding would exchange."""

Precision = Callable[[int | None, str], float]
"""Relative error up to which a block agrees: by its layer, and its name."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What was found: ``causes``, and for each layer the largest relative ``errors`` of any of its blocks."""

    causes: list[Cause] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def metrics(self, where: str) -> Iterator[Metric]:
        """The errors as numbers of layers."""
        for layer, error in enumerate(self.errors):
            yield exact("execution_error", where, error, layer=layer)


class Input:
    """What enters the next layer of one run, as the engine has it."""

    def __init__(self, run: Recorded, looked_up: Tensor) -> None:
        self.run, self.looked_up = run, looked_up
        self.x = looked_up

    def told(self, layer: int, name: str) -> Tensor | None:
        """One of the four of a layer, in float32."""
        found = self.run.take(layer, name)
        return None if found is None else found.to(torch.float32)

    def noise(self, layer: int) -> float:
        """Relative rounding of the engine's hidden states."""
        found = self.run.take(layer, HIDDEN)
        return 0.0 if found is None else torch.finfo(found.dtype).eps


class LayerBlocks:
    """One layer of all runs."""

    def __init__(
        self,
        source: CheckpointWeights,
        number: int,
        layer: DecoderLayer,
        inputs: Sequence[Input],
        precision: Precision,
        found: Findings,
    ) -> None:
        self._n, self._layer, self._inputs = number, layer, inputs
        self._precision, self._found = precision, found
        self._config = source.config.text
        self._experts = ExpertLayer(source, number, layer.mlp)
        self._linear = layer.layer_type == "linear_attention"
        self._mixer = "linear attention" if self._linear else "attention"
        self._worst = 0.0

    def check(self) -> None:
        """Compare its blocks, and let what the engine made of the tokens be the input of the next layer."""
        mixed, made = ([one.told(self._n, name) for one in self._inputs] for name in (MIXER, MOE))
        outs = [one.told(self._n, HIDDEN) for one in self._inputs]
        sums: list[tuple[Input, Tensor, Tensor]] = []
        for i, (one, out) in enumerate(zip(self._inputs, outs, strict=True)):
            if out is None:
                continue
            m, e = mixed[i], made[i]
            if m is None and e is not None:
                mixed[i] = out - one.x - e
            elif m is not None and e is None:
                made[i] = out - one.x - m
            elif m is not None and e is not None:
                sums.append((one, out, one.x + m + e))
        self._check_sums(sums)
        whole = [i for i, m in enumerate(mixed) if m is None]
        apart = [i for i, m in enumerate(mixed) if m is not None]
        if apart:
            self._check_mixer(apart, mixed)
            self._check_experts(apart, mixed, made)
        if whole:
            self._check_whole(whole, outs)
        for one, out in zip(self._inputs, outs, strict=True):
            one.x = one.x if out is None else out
        self._found.errors.append(self._worst)

    def _check_mixer(self, chosen: Sequence[int], mixed: Sequence[Tensor | None]) -> None:
        def expected(broken: Broken) -> list[Tensor]:
            return [self._mix(self._inputs[i], broken) for i in chosen]

        self._judge(self._mixer, self._told(chosen, mixed), expected, LINEAR if self._linear else ATTENTION)

    def _check_experts(
        self, chosen: Sequence[int], mixed: Sequence[Tensor | None], made: Sequence[Tensor | None]
    ) -> None:
        between = [self._inputs[i].x + m for i in chosen if (m := mixed[i]) is not None]
        routers = [self._inputs[i].told(self._n, ROUTER) for i in chosen]
        if all(router is not None for router in routers):
            scored = [self._route(self._inputs[i], x) for i, x in zip(chosen, between, strict=True)]
            self._judge("router", self._told(chosen, self._spread(chosen, routers)), lambda broken: scored, ())

        def expected(broken: Broken) -> list[Tensor]:
            return [
                self._expert(self._inputs[i], x, router, broken)
                for i, x, router in zip(chosen, between, routers, strict=True)
            ]

        self._judge("experts", self._told(chosen, made), expected, EXPERTS)

    def _check_whole(self, chosen: Sequence[int], outs: Sequence[Tensor | None]) -> None:
        """Where the engine told what comes out of the layer alone: mixer and experts together."""
        added: list[Tensor | None] = list(outs)
        for i in chosen:
            out = outs[i]
            added[i] = None if out is None else out - self._inputs[i].x

        def expected(broken: Broken, block: str = "") -> list[Tensor]:
            parts = []
            for one in (self._inputs[i] for i in chosen):
                mixed = self._mix(one, RIGHT if block == "experts" else broken)
                made = self._expert(one, one.x + mixed, None, RIGHT if block == self._mixer else broken)
                parts.append(mixed + made)
            return parts

        told = self._told(chosen, added, undecided=True)
        right = expected(RIGHT)
        result = compare_block(told, right, max(self._limit(self._mixer), self._limit("experts")))
        self._worst = max(self._worst, result.worst)
        if not result.differs:
            return
        for block, known in ((self._mixer, LINEAR if self._linear else ATTENTION), ("experts", EXPERTS)):

            def broken_block(broken: Broken, block: str = block) -> list[Tensor]:
                return expected(broken, block)

            if self._explain(block, told, result, broken_block, known):
                return
        self._add(CauseKind.EXECUTION, f"layer {self._n}", f"{result.said()}; no fault that is known explains it")

    def _check_sums(self, sums: Sequence[tuple[Input, Tensor, Tensor]]) -> None:
        told = [Told(run=one.run, given=out, noise=one.noise(self._n), carrier=expected) for one, out, expected in sums]
        result = compare_block(told, [expected for _, _, expected in sums], self._limit(SUM))
        self._worst = max(self._worst, result.worst)
        if result.differs:
            text = f"{result.said()}: hidden states after it are not those before it and what its blocks add"
            self._add(CauseKind.EXECUTION, f"layer {self._n} residual", text)

    def _judge(
        self,
        block: str,
        told: Sequence[Told],
        expected: Callable[[Broken], list[Tensor]],
        known: Sequence[Known],
    ) -> None:
        result = compare_block(told, expected(RIGHT), self._limit(block))
        self._worst = max(self._worst, result.worst)
        if result.differs and not self._explain(block, told, result, expected, known):
            kind = result.pattern(CauseKind.STATE, CauseKind.PADDING, CauseKind.EXECUTION)
            text = f"{result.said()}; no fault that is known explains it"
            self._add(kind, f"layer {self._n} {block}", text)

    def _explain(
        self,
        block: str,
        told: Sequence[Told],
        result: Agreement,
        expected: Callable[[Broken], list[Tensor]],
        known: Sequence[Known],
    ) -> bool:
        """Name the fault that gives what the engine gave, if one does."""
        for one in known:
            if not _shows(one, told):
                continue
            again = compare_block(told, expected(one.broken), self._limit(block))
            if not again.differs:
                text = f"{result.said()}: {one.said} (computed so, it agrees to {again.worst:.1g})"
                self._add(one.kind, f"layer {self._n} {block}", text)
                return True
        return False

    def _limit(self, block: str) -> float:
        return self._precision(self._n, block)

    def _add(self, kind: CauseKind, where: str, text: str) -> None:
        role = TensorRole(section=Section.TEXT, kind=Kind.INPUT_NORM, layer=self._n)
        self._found.causes.append(cause(kind, role, text, where=where))

    def _told(self, chosen: Sequence[int], values: Sequence[Tensor | None], *, undecided: bool = False) -> list[Told]:
        found = []
        for i in chosen:
            one, value = self._inputs[i], values[i]
            if value is None:
                continue
            noise = one.noise(self._n)
            left = self._ties(one, noise) if undecided else None
            carrier = one.x if value.shape == one.x.shape else None
            found.append(Told(run=one.run, given=value, noise=noise, carrier=carrier, undecided=left))
        return found

    def _spread(self, chosen: Sequence[int], values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Values of the ``chosen`` at their places among all."""
        placed: list[Tensor | None] = [None] * len(self._inputs)
        for i, value in zip(chosen, values, strict=True):
            placed[i] = value
        return placed

    def _ties(self, one: Input, noise: float) -> Tensor:
        """Tokens whose last chosen expert and first that is not lie too near for the engine's own rounding [B, T]."""
        logits = self._route(one, one.x + self._mix(one, RIGHT))
        k = self._config.num_experts_per_tok
        top = logits.topk(min(k + 1, logits.shape[-1]), dim=-1).values
        near: Tensor = (top[..., k - 1] - top[..., -1]) < TIE * noise * top.abs().amax(-1).clamp(min=1.0)
        return near if top.shape[-1] > k else torch.zeros_like(near)

    def _mix(self, one: Input, broken: Broken) -> Tensor:
        at = Placed(config=self._config, real=one.run.real, calls=one.run.calls)
        normal = _normed(self._layer.input_layernorm, one.x, broken)
        if self._linear:
            return linear_attention(self._layer.linear_attn, normal, at, broken)
        return attention(self._layer.self_attn, normal, at, broken)

    def _route(self, one: Input, x: Tensor) -> Tensor:
        return self._experts.router(_normed(self._layer.post_attention_layernorm, x, RIGHT))

    def _expert(self, one: Input, x: Tensor, router: Tensor | None, broken: Broken) -> Tensor:
        real = one.run.real
        rows = _normed(self._layer.post_attention_layernorm, x, broken)[real]
        logits = self._experts.router(rows) if router is None else router[real]
        out = torch.zeros_like(x)
        out[real] = self._experts.added(rows, logits, broken)
        return out


def _shows(known: Known, told: Sequence[Told]) -> bool:
    """Whether any of the runs could show a fault."""
    if known.needs == "calls":
        return any(len(one.run.calls) > 1 for one in told)
    return known.needs != "padding" or any(one.run.padded for one in told)


def _normed(norm: RMSNorm, x: Tensor, broken: Broken) -> Tensor:
    if "offset of the norm" in broken:
        return rms_normalize(x, norm.eps) * norm.weight
    out: Tensor = norm(x)
    return out
