"""What a comparison found: the record that every output is made from."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.metric import Metric, Verdict
from qconvert.parity.attribution import Attribution
from qconvert.parity.because import because
from qconvert.parity.causes import Cause, Severity
from qconvert.parity.limits import Limit, of_model
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.tensors import RoleSummary, TensorComparison


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """A comparison of two checkpoints.

    Attributes:
        original: as the user named it.
        converted: the same.
        bytes_original: bytes of all tensors.
        causes: faults that were named, worst first.
        metrics: every number with its verdict.
        tensors: those that are not identical, worst first.
        identical: tensors that are bit for bit the same.
        roles: tensors together by role, worst first.
        text: what the models were run on; empty when they were not.
        tokens: positions that were scored.
        notes: what a reader must know to read the numbers.
        unjudged: limits that bound no number of this report.
        curves: pictures of the model metrics.
        experts: how often each was used, and what rounding cost it.
        attribution: what each part is worth; ``None`` where it was not asked for.
    """

    original: str
    converted: str
    bytes_original: int
    bytes_converted: int
    causes: tuple[Cause, ...]
    metrics: tuple[Metric, ...]
    tensors: tuple[TensorComparison, ...]
    identical: int
    roles: tuple[RoleSummary, ...]
    text: str
    tokens: int
    notes: tuple[str, ...] = ()
    unjudged: tuple[Limit, ...] = ()
    curves: tuple[Curve, ...] = ()
    experts: tuple[ExpertUse, ...] = ()
    attribution: Attribution | None = None

    @property
    def verdict(self) -> Verdict:
        """``FAIL`` for a cause that is an error or a limit that is exceeded, else ``AMBIGUOUS`` for one that may be.

        A limit on the models that judged nothing may be exceeded as well.
        """
        verdicts = {metric.verdict for metric in self.metrics}
        if any(one.severity is Severity.ERROR for one in self.causes) or Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.AMBIGUOUS if Verdict.AMBIGUOUS in verdicts or of_model(self.unjudged) else Verdict.PASS

    @property
    def because(self) -> str:
        """Why, in one sentence."""
        return because(self.causes, self.metrics, self.unjudged)

    def metric(self, name: str, where: str, layer: int | None = None) -> Metric:
        """One number, for example ``kl_mean`` of ``as served``, or ``router_overlap`` of layer 3.

        Raises:
            KeyError: there is none.
        """
        for metric in self.metrics:
            if (metric.name, metric.where, metric.layer) == (name, where, layer):
                return metric
        raise KeyError(f"{name} of {where}" + ("" if layer is None else f", layer {layer}"))
