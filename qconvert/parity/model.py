"""Both models over the same tokens, layer by layer: neither is ever in memory as a whole.

Shapes: B windows, T tokens, D hidden, V vocabulary, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import Activation
from qconvert.numerics.activations import quantize_activations
from qconvert.parity.logits import TokenScores, VocabularyScan
from qconvert.parity.tensors import Progress
from qconvert.weights.source import CheckpointWeights
from reference_model.layerwise import InputRounding, LayerRecord, leave_inputs, run_layers

HEAD_SLAB = 8192
"""Vocabulary entries whose logits are in memory at once, of both models, for ``HEAD_ROWS`` tokens."""

HEAD_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """One way of running the converted model against the original.

    Attributes:
        mode: ``weights only``, or ``as served`` with the activation rounding of engines.
        router_overlap: of each layer, the share of the original's k experts that the converted model chose too.
    """

    mode: str
    scores: TokenScores
    router_overlap: tuple[float, ...]


def compare_models(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    batches: Sequence[Tensor],
    progress: Progress = lambda phase, done, total: None,
) -> tuple[ModelComparison, ModelComparison]:
    """Run both in float32 over token windows [B, T] and score every position that has a next token.

    Gives ``weights only`` and ``as served``; they are one run where no activation is rounded.
    """
    experts: list[list[Tensor]] = [[] for _ in original.config.text.layer_types]

    def remember(record: LayerRecord) -> None:
        experts[record.layer].append(record.routing.experts.to(torch.int32))

    hidden = _run(original, batches, leave_inputs, _Ticks(progress, "original", original, batches, remember))

    def score(mode: str, rounding: InputRounding) -> ModelComparison:
        overlaps: list[list[Tensor]] = [[] for _ in experts]

        def meet(record: LayerRecord) -> None:
            known = experts[record.layer][record.batch]
            shared = (known.unsqueeze(2) == record.routing.experts.unsqueeze(1)).any(2)
            overlaps[record.layer].append(shared.to(torch.float32))

        theirs = _run(converted, batches, rounding, _Ticks(progress, mode, converted, batches, meet))
        scores = _score(original, converted, batches, hidden, theirs, rounding, partial(progress, f"{mode}: logits"))
        shares = tuple(float(torch.cat(layer).mean()) for layer in overlaps)
        return ModelComparison(mode=mode, scores=scores, router_overlap=shares)

    plain = score("weights only", leave_inputs)
    rounding = served_rounding(converted)
    if rounding is None:
        return plain, ModelComparison(mode="as served", scores=plain.scores, router_overlap=plain.router_overlap)
    return plain, score("as served", rounding)


def served_rounding(source: CheckpointWeights) -> InputRounding | None:
    """What engines do to the inputs of each quantized matrix; ``None`` when they leave all of them alone.

    The experts of a layer share one scheme in every engine: that of the first.
    """
    rounded = {
        source.stored[role].name: scheme.activation
        for role in source.stored
        if role.section is Section.TEXT
        and (scheme := source.scheme(role)) is not None
        and scheme.activation != Activation()
        and role.expert in (None, 0)
    }
    if not rounded:
        return None
    prefix = source.view.naming.value

    def of(module: str) -> Callable[[Tensor], Tensor] | None:
        name = module if module == "lm_head" else prefix + module
        for stacked, first in (("gate_up_proj", "0.gate_proj"), ("down_proj", "0.down_proj")):
            name = name.replace(f"mlp.experts.{stacked}", f"mlp.experts.{first}")
        activation = rounded.get(name)
        return None if activation is None else partial(quantize_activations, activation=activation)

    return of


class _Ticks:
    """Tells ``progress`` after each layer of each batch, then passes the record on."""

    def __init__(
        self,
        progress: Progress,
        phase: str,
        source: CheckpointWeights,
        batches: Sequence[Tensor],
        then: Callable[[LayerRecord], None],
    ) -> None:
        self._progress, self._phase, self._then = progress, phase, then
        self._done, self._total = 0, len(batches) * source.config.text.num_hidden_layers

    def __call__(self, record: LayerRecord) -> None:
        self._then(record)
        self._done += 1
        self._progress(self._phase, self._done, self._total)


def _run(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    rounding: InputRounding,
    on_layer: Callable[[LayerRecord], None],
) -> list[Tensor]:
    return run_layers(source.config.text, source, batches, torch.float32, on_layer=on_layer, input_rounding=rounding)


@torch.no_grad()
def _score(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    batches: Sequence[Tensor],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    rounding: InputRounding,
    progress: Callable[[int, int], None],
) -> TokenScores:
    """Scores of all positions but the last of each window, one slab of both heads at a time."""
    ours_TD, theirs_TD = (torch.cat([x[:, :-1].flatten(0, 1) for x in hidden]) for hidden in (ours, theirs))
    before = rounding("lm_head")
    if before is not None:
        theirs_TD = before(theirs_TD)
    scan = VocabularyScan(torch.cat([ids[:, 1:].flatten() for ids in batches]))
    vocabulary = original.config.text.vocab_size
    for (first, ours_VD), (_, theirs_VD) in zip(_head(original), _head(converted), strict=True):
        progress(first, vocabulary)
        for row in range(0, ours_TD.shape[0], HEAD_ROWS):
            rows = slice(row, row + HEAD_ROWS)
            scan.add(
                row, first, functional.linear(ours_TD[rows], ours_VD), functional.linear(theirs_TD[rows], theirs_VD)
            )
    progress(vocabulary, vocabulary)
    return scan.scores()


def _head(source: CheckpointWeights) -> Iterator[tuple[int, Tensor]]:
    """Slabs of the output matrix in float32 with their first entry: [v, D] each."""
    kind = Kind.EMBEDDING if source.config.text.tie_word_embeddings else Kind.HEAD
    role = TensorRole(section=Section.TEXT, kind=kind)
    for first in range(0, source.config.text.vocab_size, HEAD_SLAB):
        yield first, source.matrix(role, first, min(first + HEAD_SLAB, source.config.text.vocab_size))
