"""Where an engine's states part from the reference: each block of each layer alone, fed what the engine fed it.

A block that differs while its input agrees is at fault itself; what comes after it inherits the error, and is judged by
its own. A block that differs is computed again with each of the faults that are known, and named after the one that
gives what the engine gave.

Shapes: B rows, T tokens, D hidden, E experts, V vocabulary, R rows that are no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from qconvert.core.metric import Metric, exact
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.parity.causes import Cause, CauseKind, cause
from qconvert.parity.execution.agreement import Agreement, Told, compare_block
from qconvert.parity.execution.experts import ExpertLayer
from qconvert.parity.execution.known import ATTENTION, EXPERTS, LINEAR, Known
from qconvert.parity.execution.mixers import RIGHT, Broken, Mixer, Placed, attention, linear_attention
from qconvert.parity.execution.recorded import HIDDEN, MIXER, MOE, ROUTER, Recorded
from qconvert.weights.source import CheckpointWeights
from reference_model.layer import DecoderLayer
from reference_model.layerwise import look_up
from reference_model.load import fill_weights
from reference_model.norm import RMSNorm, rms_normalize

HEAD, EMBEDDING, SUM = "output head", "embedding", "sum"

HEAD_TOKENS = 4
"""Of each row whose logits are compared: the last ones, since the output matrix may be large."""

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


@torch.no_grad()
def localise(
    source: CheckpointWeights,
    runs: Sequence[Recorded],
    precision: Precision,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:
    """Compare runs of an engine with the reference that has the weights of ``source``, one layer at a time."""
    config = source.config.text
    found = Findings()
    inputs = [_Input(run, look_up(source, run.ids, torch.float32)) for run in runs]
    _check_embeddings(inputs, precision, found)
    for n in range(config.num_hidden_layers):
        progress(n, config.num_hidden_layers)
        with torch.device("meta"):
            layer = DecoderLayer(config, config.layer_types[n])
        fill_weights(layer, source, torch.float32, prefix=f"layers.{n}.", skip=("mlp.experts.",))
        _Layer(source, n, layer, inputs, precision, found).check()
    _check_head(source, inputs, precision, found)
    progress(config.num_hidden_layers, config.num_hidden_layers)
    found.causes = _together(found.causes)
    return found


class _Input:
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


def _check_embeddings(inputs: Sequence[_Input], precision: Precision, found: Findings) -> None:
    """What enters the first layer: as the engine told it, or what is left of that layer's output without its blocks."""
    told, looked_up = [], []
    for one in inputs:
        given, carrier = one.run.embeddings, None
        noise = 0.0 if given is None else torch.finfo(given.dtype).eps
        if given is None:
            out, mixed, made = (one.told(0, name) for name in (HIDDEN, MIXER, MOE))
            if out is None or mixed is None or made is None:
                continue
            given, carrier, noise = out - mixed - made, out, one.noise(0)
        told.append(Told(run=one.run, given=given.to(torch.float32), noise=noise, carrier=carrier))
        looked_up.append(one.looked_up)
    result = compare_block(told, looked_up, precision(None, EMBEDDING))
    for one in told:
        if one.run.embeddings is not None or result.differs:
            next(i for i in inputs if i.run is one.run).x = one.given
    if result.differs:
        text = f"{result.said()}: the engine looks tokens up in another table, or elsewhere"
        role = TensorRole(section=Section.TEXT, kind=Kind.EMBEDDING)
        found.causes.append(cause(CauseKind.EXECUTION, role, text, where=EMBEDDING))


class _Layer:
    """One layer of all runs."""

    def __init__(
        self,
        source: CheckpointWeights,
        number: int,
        layer: DecoderLayer,
        inputs: Sequence[_Input],
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
        sums: list[tuple[_Input, Tensor, Tensor]] = []
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

    def _check_sums(self, sums: Sequence[tuple[_Input, Tensor, Tensor]]) -> None:
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

    def _ties(self, one: _Input, noise: float) -> Tensor:
        """Tokens whose last chosen expert and first that is not lie too near for the engine's own rounding [B, T]."""
        logits = self._route(one, one.x + self._mix(one, RIGHT))
        k = self._config.num_experts_per_tok
        top = logits.topk(min(k + 1, logits.shape[-1]), dim=-1).values
        near: Tensor = (top[..., k - 1] - top[..., -1]) < 64 * noise * top.abs().amax(-1).clamp(min=1.0)
        return near if top.shape[-1] > k else torch.zeros_like(near)

    def _mix(self, one: _Input, broken: Broken) -> Tensor:
        at = Placed(config=self._config, real=one.run.real, calls=one.run.calls)
        mixer: Mixer = linear_attention if self._linear else attention  # type: ignore[assignment]
        net = self._layer.linear_attn if self._linear else self._layer.self_attn
        return mixer(net, _normed(self._layer.input_layernorm, one.x, broken), at, broken)  # type: ignore[arg-type,call-arg]

    def _route(self, one: _Input, x: Tensor) -> Tensor:
        return self._experts.router(_normed(self._layer.post_attention_layernorm, x, RIGHT))

    def _expert(self, one: _Input, x: Tensor, router: Tensor | None, broken: Broken) -> Tensor:
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


def _check_head(source: CheckpointWeights, inputs: Sequence[_Input], precision: Precision, found: Findings) -> None:
    """The final norm and the output matrix, on the last tokens of each row."""
    config = source.config.text
    chosen = [one for one in inputs if one.run.logits is not None]
    if not chosen:
        return
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    fill_weights(norm, source, torch.float32, prefix="norm.")
    head = TensorRole(section=Section.TEXT, kind=Kind.EMBEDDING if config.tie_word_embeddings else Kind.HEAD)
    told, expected = [], []
    last = slice(-HEAD_TOKENS, None)
    matrix = source.matrix(head)
    for one in chosen:
        if one.run.logits is None:
            continue
        given = one.run.logits[:, last]
        noise, first = torch.finfo(given.dtype).eps, one.x.shape[1] - given.shape[1]
        told.append(Told(run=one.run, given=given.to(torch.float32), noise=noise, first=first))
        expected.append(functional.linear(norm(one.x[:, last]), matrix))
    result = compare_block(told, expected, precision(None, HEAD))
    if result.differs:
        text = f"{result.said()}: the final norm or the output matrix"
        found.causes.append(cause(CauseKind.EXECUTION, head, text, where=HEAD))


def _together(causes: Sequence[Cause]) -> list[Cause]:
    """The same fault in several layers as one, with the evidence of the first."""
    groups: dict[tuple[CauseKind, str, str], list[Cause]] = {}
    for one in causes:
        said = one.evidence.partition(": ")[2].partition(" (computed")[0]
        block = one.where.partition(" ")[2].partition(" ")[2]
        groups.setdefault((one.kind, block, said or one.where), []).append(one)
    out = []
    for (kind, block, _), members in groups.items():
        first = members[0]
        if len(members) == 1 or first.role is None:
            out += members
            continue
        numbers = ", ".join(str(one.role.layer) for one in members[:-1] if one.role is not None)
        last = members[-1].role
        where = f"layers {numbers} and {'' if last is None else last.layer} {block}".rstrip()
        out.append(cause(kind, first.role, f"first in layer {first.role.layer}, {first.evidence}", where=where))
    return out
