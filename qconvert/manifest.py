"""`manifest.json` beside the converted weights: what was decided, what it cost, and the hash of every tensor.

The last line is a seal over all lines before it: a manifest that was damaged or edited by hand vouches for nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import log10
from typing import Any

from qconvert import __version__
from qconvert.core.coverage import LayerCoverage, layer_name
from qconvert.core.plan import Folding, Plan
from qconvert.execute import Folded, Loss, Outcome
from qconvert.io.file_record import FileRecord
from qconvert.io.hashing import new_hash

MANIFEST_FILE = "manifest.json"
SOURCE_QUANTIZATION = "source_quantization"
REENCODING = "reencoding"
SCALE_ERROR = "scale_error"
SHARED_EXPERT = "shared_expert"
PACKAGE = "package"
CALIBRATION = "calibration"
LOSS_OVER_NEAREST = "loss_over_nearest"
EXPERT_COVERAGE = "expert_coverage"
AWQ_FOLDS = "awq_folds"


def summary(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    *,
    policy: Sequence[Mapping[str, Any]],
    reencoding: Mapping[str, Any] | None = None,
    folding: Folding | None = None,
    package: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    algorithm: str,
    config_hash: str,
    device: str,
) -> dict[str, Any]:
    """What a manifest says of the whole; the same input and options give the same, however the input is sharded.

    Args:
        plan: what was done.
        outcomes: what is known of its steps.
        policy: the rules that decided, as ``Policy.entries`` gives them; none where codes are only moved.
        reencoding: what decided there.
        folding: what became of the shared expert; ``None`` where it is stored as in the source.
        package: what was asked of an ONNX package; ``None`` for a checkpoint.
        calibration: method and text where matrices were rounded by what their inputs look like.
        algorithm: of the hashes of tensors and files.
        config_hash: xxh3-128 of the source's ``config.json``.
        device: type of the device that rounded.
    """
    moved: dict[str, Any] = {}
    if reencoding is not None:
        moved[REENCODING] = dict(reencoding)
    scale_error = scale_error_by_role(plan, outcomes)
    if scale_error:
        moved[SCALE_ERROR] = scale_error
    if folding is not None:
        moved[SHARED_EXPERT] = folding.value
    if package is not None:
        moved[PACKAGE] = dict(package)
    if calibration is not None:
        fitted = any(outcome.fit is not None for outcome in outcomes.values())
        folded = folded_by_fold(plan, outcomes)
        moved[CALIBRATION] = {
            **calibration,
            **(fit_by_role(plan, outcomes) if fitted else {}),
            **({AWQ_FOLDS: folded} if folded else {}),
        }
    return {
        "qconvert": __version__,
        "hash": algorithm,
        "device": device,
        "config_hash": config_hash,
        "source_hash": _source_hash(plan, outcomes, algorithm),
        "policy_hash": plan.policy_hash,
        "policy": [dict(rule) for rule in policy],
        "decisions": [
            {"role": role, "action": action, "reason": reason, "tensors": tensors, "bytes": nbytes}
            for role, action, reason, tensors, nbytes in plan.decisions()
        ],
        "left_out": dict(plan.left_out),
        **of_quantized(plan.source_quantization, rounded=reencoding is None),
        **moved,
        "sqnr_db": sqnr_by_role(plan, outcomes),
    }


def of_quantized(source: Mapping[str, Any] | None, *, rounded: bool) -> dict[str, Any]:
    """What the source was, if it was quantized, and, where its matrices were ``rounded``, what losses are losses of."""
    if source is None:
        return {}
    against = {"sqnr_db_against": "the source dequantized in float32"} if rounded else {}
    return {SOURCE_QUANTIZATION: {**source, **against}}


def manifest_parts(
    head: Mapping[str, Any],
    files: Mapping[str, FileRecord],
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    hashes: Mapping[str, str],
) -> Iterator[bytes]:
    """The file's content: ``summary``, the other files, then every output tensor on a line of its own, and the seal.

    A tensor has its hash, type and shape, the number of its decision, which gives scheme and reason, and the source
    rows that it was made from with their hash. Of a matrix that is quantized in the source it names the first part,
    the codes, and the hash is that of all parts.
    """
    seal = new_hash(head["hash"])
    for part in _unsealed(head, files, plan, outcomes, hashes):
        seal.update(memoryview(part))
        yield part
    yield seal_line(seal.hexdigest())


TENSORS_LINE = b' "tensors": {\n'
"""What stands between the whole and the tensors."""

END_LINE = b" },\n"
"""What stands between the tensors and the seal."""


def seal_line(digest: str) -> bytes:
    """The end of the file, not sealed itself."""
    return f' "seal": "{digest}"\n}}\n'.encode()


def _unsealed(
    head: Mapping[str, Any],
    files: Mapping[str, FileRecord],
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    hashes: Mapping[str, str],
) -> Iterator[bytes]:
    numbers = {(one["role"], one["action"], one["reason"]): n for n, one in enumerate(head["decisions"])}
    infos = {info.name: info for info in plan.layout.tensors}
    whole = {**head, "files": {name: record.line() for name, record in files.items()}}
    yield json.dumps(whole, indent=1)[:-2].encode() + b",\n" + TENSORS_LINE
    separator = b""
    for step in plan.steps:
        part = step.inputs[0]
        entry = {
            "decision": numbers[step.role.path, str(step.action), step.action.reason],
            "source": part.tensor,
            "rows": [part.begin, part.end],
            "source_hash": outcomes[step.key].source_hash,
        }
        for name in step.outputs:
            stored = {"hash": hashes[name], "dtype": infos[name].dtype.value, "shape": list(infos[name].shape)}
            yield separator + f"  {json.dumps(name)}: {json.dumps({**stored, **entry})}".encode()
            separator = b",\n"
    yield b"\n" + END_LINE


def sqnr_by_role(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, float | None]:
    """Signal to rounding error in dB, ``10 log10(sum w^2 / sum (w - w_hat)^2)``, over all matrices of a role.

    ``None`` where nothing was lost.
    """
    sums: dict[str, tuple[float, float]] = {}
    for step in plan.steps:
        loss = outcomes[step.key].loss
        if loss is not None:
            signal, error = sums.get(step.role.path, (0.0, 0.0))
            sums[step.role.path] = (signal + loss.signal, error + loss.squared_error)
    return {path: db(Loss(squared_error=error, signal=signal)) for path, (signal, error) in sums.items()}


def fit_by_role(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What rounding on text gave: by role path the error of outputs over that of rounding to nearest, and coverage.

    Nothing where matrices were not rounded so, ``None`` for an error that is not known. Coverage counts routed experts'
    matrices: all of them, those that no token reached, and those that fewer tokens reached than they have inputs; and
    tells of the experts of each layer how many tokens they got.
    """
    losses: dict[str, tuple[float, float]] = {}
    support: Counter[str] = Counter()
    reached: dict[str, dict[int, int]] = {}
    inputs: dict[str, int] = {}
    for step in plan.steps:
        fit = outcomes[step.key].fit
        if fit is None:
            continue
        nearest, loss = losses.get(step.role.path, (0.0, 0.0))
        losses[step.role.path] = (nearest + fit.nearest_loss, loss + fit.loss)
        if step.role.expert is not None:
            support[fit.support] += 1
            layer = layer_name(step.role.section, step.role.layer)
            reached.setdefault(layer, {})[step.role.expert] = fit.tokens
            inputs[layer] = max(inputs.get(layer, 0), fit.inputs)
    if not losses:
        return {}
    layers = [LayerCoverage.of(name, inputs[name], tokens) for name, tokens in reached.items()]
    return {
        LOSS_OVER_NEAREST: {path: round(loss / near, 6) if near else None for path, (near, loss) in losses.items()},
        EXPERT_COVERAGE: {
            "matrices": support.total(),
            "fewest_tokens": min((layer.least for layer in layers), default=0),
            "fewer_tokens_than_inputs": support["few"],
            "no_token": support["pooled"],
            "no_information": support["none"],
            "layers": [layer.entry() for layer in layers],
        },
    }


def folded_by_fold(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What AWQ divided: by fold how many tensors, how strongly, and what was left of the errors of their readers.

    ``strength`` is the mean of ``|log2|`` of factors, ``loss_over_unfolded`` the geometric mean of errors of outputs
    over those without the fold. Of the norm before experts ``router_flips`` has the share of the router's choices that
    are others by section and layer, and ``given_up`` the layers in which they were too many.
    """
    by_fold: dict[str, list[tuple[str, Folded]]] = {}
    for step in plan.steps:
        folded, role = outcomes[step.key].folded, step.role
        if folded is not None:
            by_fold.setdefault(folded.fold, []).append((f"{role.section.value} layer {role.layer}", folded))
    return {fold: _folds_together(members) for fold, members in by_fold.items()}


def _folds_together(members: Sequence[tuple[str, Folded]]) -> dict[str, Any]:
    folds = [folded for _, folded in members]
    losses = [log10(folded.loss) for folded in folds if folded.loss]
    flips = {place: round(folded.flips, 6) for place, folded in members if folded.flips is not None}
    return {
        "tensors": len(folds),
        "scaled": sum(folded.exponent > 0 for folded in folds),
        "strength": round(sum(folded.strength for folded in folds) / len(folds), 6),
        "loss_over_unfolded": round(10 ** (sum(losses) / len(losses)), 6) if losses else None,
        **({"router_flips": flips, "given_up": [at for at, folded in members if folded.given_up]} if flips else {}),
    }


def scale_error_by_role(plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """The largest relative error of a scale of each role whose codes were moved; 0 where all are what they were."""
    largest: dict[str, float] = {}
    for step in plan.steps:
        error = outcomes[step.key].scale_error
        if error is not None:
            largest[step.role.path] = max(error, largest.get(step.role.path, 0.0))
    return largest


def db(loss: Loss) -> float | None:
    """Signal to rounding error in dB; ``None`` where nothing was lost."""
    return round(10.0 * log10(loss.signal / loss.squared_error), 4) if loss.signal and loss.squared_error else None


def _source_hash(plan: Plan, outcomes: Mapping[str, Outcome], algorithm: str) -> str:
    """Hash over all that was read: names, rows, and hashes of their bytes."""
    digest = new_hash(algorithm)
    for step in plan.steps:
        for part in step.inputs:
            line = f"{part.tensor} {part.begin} {part.end} {outcomes[step.key].source_hash}\n"
            digest.update(memoryview(line.encode()))
    return digest.hexdigest()
