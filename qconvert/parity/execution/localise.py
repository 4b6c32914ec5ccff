"""Where an engine's states part from the reference: each block of each layer alone, fed what the engine fed it.

A block that differs while its input agrees is at fault itself; what comes after it inherits the error, and is judged by
its own. A block that differs is computed again with each of the faults that are known, and named after the one that
gives what the engine gave.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from qconvert.core.role import Kind, Section, TensorRole
from qconvert.parity.causes import Cause, CauseKind, cause
from qconvert.parity.execution.agreement import Told, compare_block
from qconvert.parity.execution.layer_blocks import Findings, Input, LayerBlocks, Precision
from qconvert.parity.execution.recorded import HIDDEN, MIXER, MOE, Recorded
from qconvert.weights.source import CheckpointWeights
from reference_model.layer import DecoderLayer
from reference_model.layerwise import look_up
from reference_model.load import fill_weights
from reference_model.norm import RMSNorm

HEAD, EMBEDDING = "output head", "embedding"

HEAD_TOKENS = 4
"""Of each row whose logits are compared: the last ones, since the output matrix may be large."""


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
    inputs = [Input(run, look_up(source, run.ids, torch.float32)) for run in runs]
    _check_embeddings(inputs, precision, found)
    for n in range(config.num_hidden_layers):
        progress(n, config.num_hidden_layers)
        with torch.device("meta"):
            layer = DecoderLayer(config, config.layer_types[n])
        fill_weights(layer, source, torch.float32, prefix=f"layers.{n}.", skip=("mlp.experts.",))
        LayerBlocks(source, n, layer, inputs, precision, found).check()
    _check_head(source, inputs, precision, found)
    progress(config.num_hidden_layers, config.num_hidden_layers)
    found.causes = _together(found.causes)
    return found


def _check_embeddings(inputs: Sequence[Input], precision: Precision, found: Findings) -> None:
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
    for seen in told:
        if seen.run.embeddings is not None or result.differs:
            next(one for one in inputs if one.run is seen.run).x = seen.given
    if result.differs:
        text = f"{result.said()}: the engine looks tokens up in another table, or elsewhere"
        role = TensorRole(section=Section.TEXT, kind=Kind.EMBEDDING)
        found.causes.append(cause(CauseKind.EXECUTION, role, text, where=EMBEDDING))


def _check_head(source: CheckpointWeights, inputs: Sequence[Input], precision: Precision, found: Findings) -> None:
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
