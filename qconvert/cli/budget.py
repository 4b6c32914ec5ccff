"""`--target-size` and `--bits`: every part gets the scheme with which all fit and lose least together."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from calibration.data import calibration_windows
from qconvert.budget.parts import DEFAULT_SCHEMES, KEPT, SCHEMES
from qconvert.budget.policy_file import policy_text
from qconvert.budget.report import document, document_text, picture
from qconvert.budget.run import Asked, Budgeted, Text, decide, policy_of, said, text_said
from qconvert.cli import console
from qconvert.cli.calibrated import TextOptions
from qconvert.cli.options import parse_size
from qconvert.core.awq_fold import folds_said
from qconvert.core.errors import UsageError
from qconvert.core.plan import Plan
from qconvert.formats.engine_rules import ALONE
from qconvert.io.disk import disk_errors, sync_file
from qconvert.parity.outputs.folder import replace_text
from qconvert.plan.awq_folds import fold_by_awq, pointless_folds, scaled_by
from qconvert.plan.policy import Policy, Rule, layer_ranges
from qconvert.sequential.calibration import METHODS as BY_TEXT
from qconvert.weights.source import CheckpointWeights

TOKENS = 8192

TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        metavar="SIZE",
        help="Choose a scheme for each part so that the files with weights, headers included, take at most this, such "
        "as 24GiB, and the predicted KL is least. What is not known of the parts is measured first.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="The same with bits for each weight of all that may be rounded, scales included: routed and shared "
        "experts, attention and linear attention. int4 in groups of 128 is 4.125 and a little."
    ),
]
Sensitivities = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What parts cost, measured: read if it is there, completed and kept. Default: OUT.sensitivities.json.",
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help=f"What a budget chooses among: some of {','.join(SCHEMES)}; default: "
        f"{','.join(DEFAULT_SCHEMES)}. Each part may also stay as it is."
    ),
]  # fmt: skip
SensitivityTokens = Annotated[
    int, typer.Option("--sensitivity-tokens", min=2, help="Tokens of the calibration text that parts are measured on.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetOptions:
    """What was typed."""

    target_size: str | None = None
    bits: float | None = None
    sensitivities: Path | None = None
    candidates: str | None = None
    tokens: int = TOKENS

    @property
    def given(self) -> bool:
        """Whether there is a budget."""
        return self.target_size is not None or self.bits is not None

    def check(self, others: Sequence[tuple[str, bool]], engine: str | None) -> None:
        """Refuse what does not go together.

        Args:
            others: options that decide what a budget decides, and whether they were given.
            engine: that alone shall read the output.

        Raises:
            UsageError: two budgets, none beside options of one, an impossible one, or another decision beside it.
        """
        if not self.given:
            if self != BudgetOptions():
                raise UsageError(
                    "--sensitivities, --candidates and --sensitivity-tokens are for --target-size and --bits"
                )
            return
        if self.target_size is not None and self.bits is not None:
            raise UsageError("--target-size and --bits are two budgets: give one")
        if self.bits is not None and not 0 < self.bits <= 1000:
            raise UsageError(f"--bits {self.bits:g} is no number of bits that a weight can have")
        beside = [name for name, found in others if found]
        if beside:
            raise UsageError(f"a budget decides what {', '.join(beside)} would: drop the one or the other")
        if engine not in (None, *ALONE):
            raise UsageError(
                f"--engine {engine} gives a budget no room; {' or '.join(ALONE)} reads another scheme in each layer's "
                "experts, and without --engine they have one in all layers"
            )

    def decide(
        self,
        folder: Path,
        out: Path,
        text: TextOptions,
        method: str,
        *,
        rules: tuple[Rule, ...],
        search: bool,
        engine: str | None,
        from_quantized: bool,
        shard_bytes: int,
        quiet: bool,
    ) -> BudgetedPolicy:
        """Measure, choose, and write the files beside ``out`` and the sensitivities.

        Raises:
            UsageError, SourceError, PlanError, DataError, FormatError, OutputError: see ``budget.run.decide``.
        """
        asked = Asked(
            losses=self.sensitivities or out.with_name(f"{out.name}.sensitivities.json"),
            target=None if self.target_size is None else parse_size(self.target_size),
            bits=self.bits,
            schemes=tuple((self.candidates or ",".join(DEFAULT_SCHEMES)).replace(" ", "").split(",")),
            layers_apart=engine is not None,
            search=search,
            search_written=search and method not in BY_TEXT,
            rules=rules,
            # with a method that reads text, what is named may be for that alone
            text_named=(text.named and method not in BY_TEXT) or self.tokens != TOKENS,
            from_quantized=from_quantized,
            shard_bytes=shard_bytes,
        )

        def windows() -> Text:
            with CheckpointWeights.open(folder) as weights:
                vocabulary = weights.config.text.vocab_size
            found = calibration_windows(
                folder, vocabulary, texts=text.texts_of(folder), tokens=self.tokens, window=text.window, seed=text.seed
            )
            return Text(batches=found.batches, record=found.record)

        folds = text.folds_of(method) if method == "awq" else ()

        def accept(plan: Plan) -> None:
            fold_by_awq(plan, folds)  # what is pointless however many matrices are rounded is the user's to mend

        with console.progress(in_bytes=False, quiet=quiet) as advance:
            tell = (lambda line: None) if quiet else console.say
            found = decide(folder, asked, windows, accept=accept, progress=advance, tell=tell)
        return BudgetedPolicy(found=found, asked=asked, files=_write(found, asked, folder, out))


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetedPolicy:
    """A decision, and the files that were written of it."""

    found: Budgeted
    asked: Asked
    files: tuple[Path, ...]

    @property
    def policy(self) -> Policy:
        """The rules of the decision before the default ones."""
        return policy_of(self.found.rules)

    def folding(self, text: TextOptions) -> tuple[TextOptions, tuple[str, ...]]:
        """``text`` without the folds that this decision leaves nothing to do, and a warning for each of them."""
        folds = text.folds_of("awq")
        idle = pointless_folds(self.found.plan, folds)
        warnings = tuple(
            f"{fold.value} is not folded: within {said(self.asked)} the budget rounds nothing that it scales "
            f"({scaled_by(fold)}); nothing has to be done"
            for fold in idle
        )
        return replace(text, folds=folds_said(fold for fold in folds if fold not in idle)), warnings

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            **document(self.found),
            "sensitivities": {"file": str(self.asked.losses), "measured_now": self.found.measured},
            "files": [str(path) for path in self.files],
        }

    def show(self) -> None:
        """What got which scheme, what that costs, and what more bytes would buy."""
        found, decision = self.found, self.found.decision
        groups: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
        for way in decision.ways:
            one = (way.part.layer, way.size.tensors, way.kl)
            groups.setdefault((way.part.group, way.scheme or KEPT), []).append(one)
        table = console.plain_table("part", "scheme", "layers", ">bytes", ">predicted KL")
        for (group, scheme), ways in groups.items():
            layers, nbytes, kl = zip(*ways, strict=True)
            table.add_row(group, scheme, layer_ranges(layers), console.gigabytes(sum(nbytes)), f"{sum(kl):.3g}")
        console.show(table)
        console.say(
            f"{said(self.asked)}: {console.gigabytes(found.file_bytes)} of files, {found.bits(decision.size):.4g} bits "
            f"for each of {found.weights:,} weights; predicted KL {decision.kl:.3g} nats, "
            f"{'the least possible' if decision.proven else f'the least possible is no less than {decision.bound:.3g}'}"
        )
        if decision.price:
            console.say(f"another 1 MB would take about {decision.price * 1e6:.2g} nats off")
        origin = f"{found.measured} measured now, the others" if found.measured else "all"
        console.say(f"sensitivities: {origin} kept in {found.losses.path}, on {text_said(found.losses.text)}")
        for path in self.files:
            console.say(f"budget: {path}")


def _write(found: Budgeted, asked: Asked, folder: Path, out: Path) -> tuple[Path, ...]:
    """The rules as a policy file beside ``out``, and what every budget buys beside the sensitivities."""
    policy = out.with_name(f"{out.name}.policy.toml")
    stem = asked.losses.name.removesuffix(".json").removesuffix(".sensitivities")
    command = shlex.join(["qconvert", "quantize", folder.name, out.name, "--policy", policy.name])
    head = (
        f"{said(asked)}: predicted KL {found.decision.kl:.3g} nats, {found.file_bytes:,} bytes of files with weights.",
        f"To change it: save it under another name, and {command}",
    )
    texts = {
        policy: policy_text(found.rules, head),
        asked.losses.with_name(f"{stem}.frontier.json"): document_text(found),
        asked.losses.with_name(f"{stem}.frontier.svg"): picture(found),
    }
    for path, text in texts.items():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_file(replace_text(path, text))
    return (asked.losses, *texts)
