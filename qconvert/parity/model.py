"""Both models over the same tokens, layer by layer: neither is ever in memory as a whole.

Shapes: B windows, T tokens, D hidden, V vocabulary, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional

from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import Activation
from qconvert.memory import available_bytes
from qconvert.numerics.activations import quantize_activations
from qconvert.parity.logits import TokenScores, VocabularyScan
from qconvert.parity.tensors import Progress
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.layerwise import HiddenStates, InputRounding, LayerRecord, leave_inputs, run_layers
from reference_model.load import ActivationStore

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
    memory: int | None = None,
) -> tuple[ModelComparison, ModelComparison]:
    """Run both in float32 over token windows [B, T] and score every position that has a next token.

    Gives ``weights only`` and ``as served``; they are one run where no activation is rounded. ``memory`` is in bytes
    for what there is of every token, by default half of what is available: a quarter of it for the hidden states of
    either model, which otherwise wait on disk, a quarter for the tokens that enter experts together.

    Raises:
        OutputError: hidden states cannot be written to disk.
    """
    quarter = (available_bytes() // 2 if memory is None else memory) // 4
    with SpillStore(quarter) as store:

        def remember(record: LayerRecord) -> None:
            store.put(f"experts.{record.layer}.{record.batch}", record.routing.experts.to(torch.int16))

        hidden = _run(original, batches, leave_inputs, "original", remember, progress, store, quarter)

        def score(mode: str, rounding: InputRounding) -> ModelComparison:
            shared = [0] * original.config.text.num_hidden_layers

            def meet(record: LayerRecord) -> None:
                known = store.get(f"experts.{record.layer}.{record.batch}")
                shared[record.layer] += int((known.unsqueeze(2) == record.routing.experts.unsqueeze(1)).sum())

            with SpillStore(quarter) as other:
                theirs = _run(converted, batches, rounding, mode, meet, progress, other, quarter)
                scores = _score(
                    original, converted, batches, hidden, theirs, rounding, partial(progress, f"{mode}: logits")
                )
            choices = sum(ids.numel() for ids in batches) * original.config.text.num_experts_per_tok
            return ModelComparison(mode=mode, scores=scores, router_overlap=tuple(n / choices for n in shared))

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


def _run(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    rounding: InputRounding,
    phase: str,
    on_layer: Callable[[LayerRecord], None],
    progress: Progress,
    store: ActivationStore,
    rows_bytes: int,
) -> HiddenStates:
    """One model over all batches; tells ``progress`` after each layer of each batch."""
    config = source.config.text
    done = count(1)

    def tick(record: LayerRecord) -> None:
        on_layer(record)
        progress(phase, next(done), len(batches) * config.num_hidden_layers)

    return run_layers(
        config,
        source,
        batches,
        torch.float32,
        on_layer=tick,
        input_rounding=rounding,
        store=store,
        rows_bytes=rows_bytes,
    )


@torch.no_grad()
def _score(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    batches: Sequence[Tensor],
    ours: HiddenStates,
    theirs: HiddenStates,
    rounding: InputRounding,
    progress: Callable[[int, int], None],
) -> TokenScores:
    """Scores of all positions but the last of each window, one slab of both heads at a time."""
    before = rounding("lm_head")
    scan = VocabularyScan(torch.cat([ids[:, 1:].flatten() for ids in batches]))
    vocabulary = original.config.text.vocab_size
    for (first, ours_VD), (_, theirs_VD) in zip(_head(original), _head(converted), strict=True):
        progress(first, vocabulary)
        row = 0
        for b in range(len(batches)):
            ours_TD, theirs_TD = (hidden[b][:, :-1].flatten(0, 1) for hidden in (ours, theirs))
            if before is not None:
                theirs_TD = before(theirs_TD)
            for z_TD, y_TD in zip(torch.split(ours_TD, HEAD_ROWS), torch.split(theirs_TD, HEAD_ROWS), strict=True):
                scan.add(row, first, functional.linear(z_TD, ours_VD), functional.linear(y_TD, theirs_VD))
                row += len(z_TD)
    progress(vocabulary, vocabulary)
    return scan.scores()


def _head(source: CheckpointWeights) -> Iterator[tuple[int, Tensor]]:
    """Slabs of the output matrix in float32 with their first entry: [v, D] each."""
    kind = Kind.EMBEDDING if source.config.text.tie_word_embeddings else Kind.HEAD
    role = TensorRole(section=Section.TEXT, kind=kind)
    for first in range(0, source.config.text.vocab_size, HEAD_SLAB):
        yield first, source.matrix(role, first, min(first + HEAD_SLAB, source.config.text.vocab_size))
