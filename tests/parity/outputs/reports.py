"""Reports made by hand: everything that a report can hold, and names as hostile as JSON allows."""

from __future__ import annotations

import math
from dataclasses import replace

from qconvert.core.metric import Metric, exact
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import int4
from qconvert.numerics.error import ErrorSums
from qconvert.parity.attribution import Attribution, Worth
from qconvert.parity.causes import CauseKind, cause
from qconvert.parity.limits import Limit
from qconvert.parity.report import ParityReport
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.tensors import Outcome, RoleSummary, TensorComparison

HOSTILE = (
    "<script>document.title='run'</script>",
    "</script><img src=x onerror=document.title='run'>",
    '" onmouseover="document.title=1',
    "a|b\\|c`d``e",
    "![x](http://a.example/x.png) [l](http://a.example) <http://a.example> www.a.example http://a.example",
    "@someone #12 *bold* _it_ ~~no~~ $x$ &lt;b&gt;",
    "]]><x/> --> {{ 7 * 7 }} {% raw %}",
    "line\nbreak\r\n# heading\t\x00\x07\u2028\ud800",
    "---\nmodel-index: []\n---",
)


def tensor(layer: int, expert: int, kind: Kind, error: float, name: str | None = None) -> TensorComparison:
    """A quantized expert's matrix whose squared error is ``error`` of its signal."""
    role = TensorRole(section=Section.TEXT, kind=kind, layer=layer, expert=expert)
    sums = ErrorSums(
        elements=64, signal=1.0, approximated=1.0, product=1 - error / 2, squared_error=error, max_error=error
    )
    said = name if name is not None else f"layers.{layer}.mlp.experts.{expert}.{kind.value.split('.')[-1]}_proj"
    return TensorComparison(role=role, name=said, outcome=Outcome.QUANTIZED, scheme=int4(32), sums=sums)


def full_report() -> ParityReport:
    """Four layers, two modes, every section."""
    layers = range(4)
    numbers = [
        Metric(
            name="kl_mean", where=mode, value=0.002 * n, low=0.0015 * n, high=0.0024 * n, unit="nats",
            limit=0.01 if n == 2 else None, reason="because" if n == 2 else "",
        )
        for n, mode in enumerate(("weights only", "as served"), start=1)
    ]  # fmt: skip
    numbers += [exact("perplexity_ratio", "as served", 1.02), exact("sqnr", "all quantized tensors", 21.0, "dB")]
    numbers += [
        exact("kl_mean", f"as served, {part}", 0.01, "nats") for part in ("positions 0-63", "domain code", "domain law")
    ]
    for where in ("as served, accumulated", "as served, teacher-forced"):
        numbers += [exact("hidden_error", where, 10.0 ** (at - 5), layer=at) for at in layers]
    numbers += [
        exact("router_overlap", mode, 0.99 - at / 50, "fraction", layer=at, better="high")
        for mode in ("weights only", "as served")
        for at in layers
    ]
    kinds = (Kind.EXPERT_GATE, Kind.EXPERT_UP, Kind.EXPERT_DOWN)
    tensors = [
        tensor(at, expert, kind, 10 ** (-2 - 0.1 * at - 0.3 * n - 0.05 * expert))
        for at in layers
        for expert in range(3)
        for n, kind in enumerate(kinds)
    ]
    tensors.sort(key=lambda one: one.sums.sqnr_db)
    role = RoleSummary(
        path="text.expert.up", scheme="int4-g32-sym", tensors=12, elements=768, identical=0, sqnr_db=21.0,
        worst_db=20.0, worst_name=tensors[0].name, cosine=0.996, max_error=0.01,
    )  # fmt: skip
    return ParityReport(
        original="models/original",
        converted="models/int4",
        bytes_original=5_000_000_000,
        bytes_converted=1_700_000_000,
        causes=(),
        metrics=tuple(numbers),
        tensors=tuple(tensors),
        identical=77,
        roles=(role, replace(role, path="text.router", scheme="", identical=12, sqnr_db=math.inf)),
        text="text: prose.txt, code.txt",
        tokens=10_220,
        notes=("Engines round no activations for this checkpoint: as served is weights only.",),
        curves=(
            Curve(
                name="kl_percentiles", where="as served", x_label="share of positions, %",
                y_label="KL(original || converted), nats",
                points=(
                    (0.0, 0.0), (1.0, 1e-7), (50.0, 1e-4), (90.0, 2e-3), (95.0, 4e-3), (99.0, 0.05), (99.9, 0.2),
                    (100.0, 1.5),
                ),
            ),
            Curve(
                name="state_drift", where="as served", x_label="share of the window, %",
                y_label="relative error of DeltaNet states", points=((50.0, 1.2e-4), (100.0, 2.6e-4)),
            ),
            Curve(
                name="greedy_common", where="as served", x_label="tokens after the prompt",
                y_label="prompts still continued alike, %", points=((0.0, 100.0), (32.0, 87.5)),
            ),
        ),
        experts=tuple(
            ExpertUse(layer=at, expert=expert, tokens=10 ** expert * (at + 1), sqnr_db=20.0 + expert)
            for at in layers
            for expert in range(3)
        ),
        attribution=attribution(),
    )  # fmt: skip


def attribution() -> Attribution:
    """Two groups, one of them by layer, and a policy."""

    def worth(group: str, layer: int | None, value: float) -> Worth:
        return Worth(
            group=group, layer=layer, kl=0.004 - value, worth=value, low=value - 2e-4, high=value + 2e-4,
            bytes_converted=300_000_000, bytes_original=1_000_000_000,
        )  # fmt: skip

    return Attribution(
        kl=0.004,
        groups=(worth("expert down", None, 0.0031), worth("attention output", None, -0.0001)),
        layers=tuple(worth("expert down", layer, 0.0012 / (layer + 1)) for layer in range(3)),
        left_out=(("expert down", 3),),
        predicted=12.5,
        seconds=11.0,
        policy='[[rule]]\nmatch = "text.expert.*"\nscheme = "int4"\ngroup = 32\n',
        advice="The policy puts text.expert of 4 layers to int4-g32-sym for +94.00 MB.",
    )


def hostile_report() -> ParityReport:
    """The same with hostile names wherever a checkpoint, a text or a policy has a say, and numbers of every kind."""
    report = full_report()
    odd = (math.nan, math.inf, -math.inf, 0.0, 1e-300)
    role = report.tensors[0].role
    return replace(
        report,
        original=HOSTILE[0],
        converted=HOSTILE[1],
        text=" ".join(HOSTILE),
        notes=HOSTILE,
        causes=(
            *(cause(CauseKind.MISSING, role, name, (name,), where=name) for name in HOSTILE),
            cause(CauseKind.CHANGED, role, HOSTILE[3], HOSTILE),
        ),
        metrics=(
            *report.metrics,
            exact("kl_p99", "as served", math.nan, "nats"),
            exact("kl_max", "as served", math.inf, "nats"),
            *(
                replace(exact("sqnr_min", name, 20.0, "dB", better="high"), limit=21.0, reason=name)
                for name in HOSTILE
            ),
            *(
                exact("kl_mean", f"as served, domain {name}", value, "nats")
                for name, value in zip(HOSTILE, odd, strict=False)
            ),
            *(exact("hidden_error", "as served, accumulated", value, layer=4 + i) for i, value in enumerate(odd)),
        ),
        unjudged=tuple(Limit(metric="kl_mean", bound=1.0, reason=name, where=name) for name in HOSTILE),
        tensors=tuple(
            replace(tensor(0, 0, Kind.EXPERT_UP, math.nan if i % 2 else 0.0), name=name)
            for i, name in enumerate(HOSTILE)
        ),
        curves=(
            Curve(
                name="kl_percentiles", where=HOSTILE[0], x_label=HOSTILE[2], y_label=HOSTILE[6],
                points=tuple((float(i), value) for i, value in enumerate(odd)),
            ),
        ),
        experts=tuple(ExpertUse(layer=0, expert=i, tokens=i, sqnr_db=value) for i, value in enumerate(odd)),
        attribution=replace(
            attribution(),
            kl=math.nan,
            groups=tuple(
                replace(one, group=name, worth=value, low=value)
                for one in attribution().groups
                for name, value in zip(HOSTILE, odd, strict=False)
            ),
            policy="".join(HOSTILE),
            advice=" ".join(HOSTILE),
        ),
    )  # fmt: skip


def bare_report() -> ParityReport:
    """Weights that are all the same, models not run."""
    return replace(
        full_report(), metrics=(), tensors=(), roles=(), text="", tokens=0, notes=(), curves=(), experts=(),
        attribution=None,
    )  # fmt: skip
