"""Plan a conversion again from what its manifest says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qconvert.core.errors import SourceError, UsageError
from qconvert.core.plan import Folding, Plan
from qconvert.io.checkpoint import Checkpoint
from qconvert.manifest import MANIFEST_FILE
from qconvert.manifest_reader import Manifest
from qconvert.plan.builder import build_plan
from qconvert.plan.policy import Policy
from qconvert.plan.reencoding import Reencoding, plan_reencoding
from qconvert.plan.refolding import plan_folding
from qconvert.rounding_by import By, check_by, plan_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """What a conversion does.

    Attributes:
        beside: files that it makes beside weights and configuration.
    """

    plan: Plan
    beside: Mapping[str, bytes] = field(default_factory=dict)


def repeated(out: Path, manifest: Manifest, by: By | None = None) -> Callable[[Checkpoint], Repeated]:
    """What plans the conversion that made ``out``, given its source, and what it was rounded by besides the weights.

    Raises:
        SourceError: the manifest tells of a conversion that there is not.
        UsageError: ``by`` is not what it tells of.
    """
    check_by(manifest.calibration, by, str(out))
    try:
        return _planner(manifest, by)
    except UsageError as error:
        raise SourceError(f"{out / MANIFEST_FILE}: {error}; the conversion cannot be repeated from it") from None


def _planner(manifest: Manifest, by: By | None) -> Callable[[Checkpoint], Repeated]:
    policy, folding = Policy.of_entries(manifest.policy, "policy"), manifest.folding
    if manifest.package is not None:
        return _package(manifest.package, policy if policy.rules else None)
    if manifest.reencoding is not None:
        method, rounding = (manifest.reencoding[key] for key in ("format", "allow_scale_rounding"))
        reencoding = Reencoding(method=method, allow_scale_rounding=rounding)
        return lambda checkpoint: Repeated(plan=plan_reencoding(checkpoint, reencoding))
    if folding is not None and not policy.rules:
        return lambda checkpoint: Repeated(plan=plan_folding(checkpoint, folding))
    quantized, fold = manifest.source_quantization is not None, folding is Folding.FOLDED

    def plan(checkpoint: Checkpoint) -> Repeated:
        found = build_plan(checkpoint, policy, from_quantized=quantized, fold=fold)
        return Repeated(plan=plan_by(found, checkpoint, by))

    return plan


def _package(entry: Mapping[str, object], policy: Policy | None) -> Callable[[Checkpoint], Repeated]:
    # Here, because onnx takes a while to import, and checkpoints do not need it.
    from qconvert.onnx_export.export import package_task
    from qconvert.onnx_export.plan import PackageOptions

    options = PackageOptions.of_entry(entry, policy)

    def plan(checkpoint: Checkpoint) -> Repeated:
        task = package_task(checkpoint, options)
        return Repeated(plan=task.plan, beside=task.beside)

    return plan
