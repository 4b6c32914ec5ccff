"""`qconvert quantize`: a checkpoint in fewer bits."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qconvert.carry_out import Conversion
from qconvert.cli import console
from qconvert.cli.budget import TOKENS as SENSITIVITY_TOKENS
from qconvert.cli.budget import (
    Bits,
    BudgetedPolicy,
    BudgetOptions,
    Candidates,
    Sensitivities,
    SensitivityTokens,
    TargetSize,
)
from qconvert.cli.calibrate import TOKENS, WINDOW, show_coverage
from qconvert.cli.calibrated import (
    USUAL_FOLDS,
    AwqFolds,
    CalibrationData,
    CalibrationSeed,
    CalibrationTokens,
    CalibrationWindow,
    Damping,
    Propagate,
    TextOptions,
    coverage_of,
    coverage_warnings,
    needs_of,
    show_needs,
)
from qconvert.cli.options import (
    PROCESSORS,
    Device,
    Fresh,
    HashName,
    Jobs,
    Json,
    MaxShardSize,
    QuantizeEngine,
    ReadBack,
    check_fold_engine,
    parse_hash,
    parse_size,
)
from qconvert.cli.planned import limits, preview, refuse_existing, show_plan
from qconvert.cli.statistics import RTN, Method, Stats, check_method, statistics_of
from qconvert.convert import convert, plan_conversion
from qconvert.core.by_statistics import IMATRIX
from qconvert.core.errors import UsageError
from qconvert.core.plan import Plan
from qconvert.device import device_named
from qconvert.formats.table import METHODS
from qconvert.io.hub import resolve
from qconvert.manifest import CALIBRATION, LOSS_OVER_NEAREST
from qconvert.numerics.hessian import DAMPING
from qconvert.plan.policy import SCHEME_NAMES, default_policy, read_rules, scheme_named
from qconvert.plan.presets import preset_rules
from qconvert.sequential.calibration import METHODS as BY_TEXT
from qconvert.sequential.memory import Needs


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or a hub id ORG/NAME.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; it appears whole or not at all.")],
    scheme: Annotated[str, typer.Option(help=f"How routed experts are rounded: {', '.join(SCHEME_NAMES)}.")] = "int4",
    group: Annotated[int | None, typer.Option(help="Inputs that share an int4 scale: 32, 64 or 128 (default).")] = None,
    asymmetric: Annotated[bool, typer.Option(help="int4 with zero points; fewer engines read it.")] = False,
    search: Annotated[
        bool, typer.Option(help="Choose every scale by least squared error: slower, a little better.")
    ] = False,
    stored_as: Annotated[
        str | None,
        typer.Option("--format", help=f"The loader that shall read it: {', '.join(METHODS)}. Default: by scheme."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="mixed: what is always active in 8 bits. fusable: the shared expert like a routed one, for SGLang."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML of ordered rules that are tried before the default ones.")
    ] = None,
    method: Method = RTN,
    stats: Stats = None,
    calibration_data: CalibrationData = None,
    calibration_tokens: CalibrationTokens = TOKENS,
    calibration_window: CalibrationWindow = WINDOW,
    calibration_seed: CalibrationSeed = 0,
    damping: Damping = DAMPING,
    propagate: Propagate = True,
    awq_folds: AwqFolds = USUAL_FOLDS,
    from_quantized: Annotated[
        bool,
        typer.Option(
            "--from-quantized",
            help="SRC may be quantized, such as the official FP8: dequantize its matrices and round anew.",
        ),
    ] = False,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold-shared-expert",
            help="Store the shared expert as routed ones, see `qconvert fold`; with --preset fusable.",
        ),
    ] = False,
    target_size: TargetSize = None,
    bits: Bits = None,
    sensitivities: Sensitivities = None,
    candidates: Candidates = None,
    sensitivity_tokens: SensitivityTokens = SENSITIVITY_TOKENS,
    engine: QuantizeEngine = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan and write no output; of a budget its decision is kept beside OUT."
        ),
    ] = False,
    jobs: Jobs = PROCESSORS,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="What the whole process may hold, such as 4GiB. Default: 1GiB, for --method gptq and awq 3GiB."
        ),
    ] = None,
    fresh: Fresh = False,
    read_back: ReadBack = True,
    max_shard_size: MaxShardSize = "5GB",
    algorithm: HashName = "xxh3-128",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Round a checkpoint to eight or four bits, tensor by tensor.

    Routed experts are rounded; everything else is carried bit for bit unless a policy says otherwise. Every tensor
    has a decision with a reason: see it with --dry-run. A run that was killed, interrupted or stopped by a full disk
    goes on when the same command is given again. What engines would misread, by the rules of `qconvert check`, is
    refused.

    With --target-size or --bits each part of the model gets the scheme with which all fit and the predicted KL is
    least: parts are measured one by one on the calibration text, once for all budgets, and --dry-run shows what got
    what. Beside OUT are then the decision as a policy file, to change it, and what other budgets would buy.

    Examples:
      qconvert quantize ./Qwen3.5-35B-A3B ./int4 --scheme int4 --group 128

      qconvert quantize ./Qwen3.5-35B-A3B ./mixed --scheme int4 --preset mixed

      qconvert quantize ./Qwen3.5-35B-A3B ./own --policy attention-int8.toml --dry-run

      qconvert quantize ./Qwen3.5-35B-A3B ./int4 --method gptq --calibration-data code=src.txt

      qconvert quantize ./Qwen3.5-35B-A3B ./int4 --method imatrix --stats ./stats

      qconvert quantize ./Qwen3.5-35B-A3B ./mixed --target-size 24GiB --dry-run

      qconvert quantize ./Qwen3.5-35B-A3B ./b5 --bits 5 --sensitivities mixed.sensitivities.json --method gptq

      qconvert quantize ./Qwen3.5-35B-A3B-FP8 ./int4 --from-quantized

      qconvert quantize ./Qwen3.5-35B-A3B ./fp8 --scheme fp8 --hash sha256 --device cuda:0
    """
    budget = BudgetOptions(
        target_size=target_size, bits=bits, sensitivities=sensitivities, candidates=candidates,
        tokens=sensitivity_tokens,
    )  # fmt: skip

    def call() -> int:
        if fold:
            check_fold_engine(engine)
        elif engine is not None and not budget.given:
            raise UsageError(
                "--engine is for --fold-shared-expert and for budgets; --format chooses the loader of what is rounded"
            )
        check_method(method, stats)
        decided_else = (
            ("--scheme", scheme != "int4"), ("--group", group is not None), ("--asymmetric", asymmetric),
            ("--preset", preset is not None), ("--format", stored_as not in (None, "compressed-tensors")),
            ("--fold-shared-expert", fold),
        )  # fmt: skip
        budget.check(decided_else, engine)
        text = TextOptions(
            data=tuple(calibration_data or ()), tokens=calibration_tokens, window=calibration_window,
            seed=calibration_seed, damping=damping, propagate=propagate, folds=awq_folds,
        )  # fmt: skip
        if method not in BY_TEXT:
            text.check_unused(method, budget=budget.given)
        elif search and not budget.given:
            raise UsageError(f"--method {method} searches its scales by what inputs count: drop --search")
        elif device_named(device).type != "cpu":
            raise UsageError(f"--method {method} runs on the CPU: drop --device {device}")
        else:
            text.folds_of(method)  # refused before a budget is measured
        chosen = scheme_named(scheme, group=group, symmetric=not asymmetric)
        searched = search or method == IMATRIX
        own = () if policy is None else read_rules(policy, search=searched)
        limit = parse_size(max_memory or ("3GiB" if method in BY_TEXT else "1GiB"))
        shard_bytes = parse_size(max_shard_size)
        hashes, place = parse_hash(algorithm), device_named(device)
        folder = resolve(source)
        refuse_existing(out)
        needed = needs_of(folder, jobs, text.tokens, limit, text.folds_of(method)) if method in BY_TEXT else None
        budgeted: BudgetedPolicy | None = None
        idle_folds: tuple[str, ...] = ()
        if budget.given:
            budgeted = budget.decide(
                folder, out, text, method, rules=own, search=searched, engine=engine, from_quantized=from_quantized,
                shard_bytes=shard_bytes, quiet=json,
            )  # fmt: skip
            rules = budgeted.policy
            if method == "awq":
                text, idle_folds = budgeted.folding(text)
        else:
            named = () if preset is None else preset_rules(preset, chosen)
            rules = default_policy(chosen, search=searched, rules=(*own, *named))
        if stored_as is not None:
            rules = rules.stored_as(stored_as)
        with statistics_of(stats, folder) as (statistics, of_statistics):
            warnings: tuple[str, ...] = (*idle_folds, *of_statistics)
            calibration = text.calibration(method, folder) if method in BY_TEXT else statistics
            if dry_run:
                plan = plan_conversion(
                    folder, rules, jobs=jobs, max_memory=limit, shard_bytes=shard_bytes,
                    from_quantized=from_quantized, fold=fold, calibration=calibration,
                )  # fmt: skip
                preview(plan, out, json=json, beside=_beside(plan, budgeted, needed, warnings) if json else None)
                if budgeted is not None and not json:
                    budgeted.show()
                if needed is not None and not json:
                    show_needs(needed, jobs, limit, out)
                _warn(warnings, json=json)
                return 0
            start = time.perf_counter()
            with console.progress(in_bytes=True, quiet=json) as advance:
                done = convert(
                    folder, out, rules, jobs=jobs, max_memory=limit, shard_bytes=shard_bytes,
                    from_quantized=from_quantized, fold=fold, calibration=calibration,
                    fresh=fresh, read_back=read_back, algorithm=hashes,
                    device=place, progress=lambda now, total: advance("rounding", now, total),
                )  # fmt: skip
            warnings = (*warnings, *coverage_warnings(done.record.get(CALIBRATION)))
        _report(done, folder, warnings, time.perf_counter() - start, budgeted, json=json)
        return 0

    raise typer.Exit(console.guarded(call))


def _beside(
    plan: Plan, budgeted: BudgetedPolicy | None, needed: Needs | None, warnings: Sequence[str]
) -> dict[str, Any]:
    """What ``--dry-run --json`` tells beside the plan: what its tables say of a budget, engines and memory."""
    return {
        "budget": None if budgeted is None else budgeted.document(),
        "engine_limits": limits(plan),
        "needs": None if needed is None else asdict(needed),
        "warnings": list(warnings),
    }


def _warn(warnings: Sequence[str], *, json: bool) -> None:
    """What a calibration lacks; with ``json`` nothing but the document is printed."""
    for warning in () if json else warnings:
        console.say(f"warning: {warning}", style="yellow")


def _report(
    done: Conversion,
    source: Path,
    warnings: Sequence[str],
    seconds: float,
    budgeted: BudgetedPolicy | None,
    *,
    json: bool,
) -> None:
    if json:
        console.show_json(
            {
                "out": str(done.out),
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "seconds": round(seconds, 3),
                **{key: done.record[key] for key in ("source_hash", "policy_hash", "decisions", "sqnr_db")},
                "source_quantization": done.plan.source_quantization,
                "engine_limits": limits(done.plan),
                "calibration": done.record.get(CALIBRATION),
                "budget": None if budgeted is None else budgeted.document(),
                "warnings": list(warnings),
            }
        )
        return
    show_plan(done.plan)
    if budgeted is not None:
        budgeted.show()
    coverage = coverage_of(done.record.get(CALIBRATION))
    if coverage is not None:
        show_coverage(coverage)
    _warn(warnings, json=json)
    for path, value in done.record.get(CALIBRATION, {}).get(LOSS_OVER_NEAREST, {}).items():
        if value is not None:
            console.say(f"{path}: {value:.1%} of the output error of rounding to nearest, on the calibration text")
    for path, value in done.record["sqnr_db"].items():
        console.say(f"{path}: signal to rounding error {'exact' if value is None else f'{value:.2f} dB'}")
    console.say(
        f"{console.gigabytes(done.bytes_before)} -> {console.gigabytes(done.bytes_after)} in {seconds:.1f} s "
        f"({done.bytes_before / 1e9 / seconds:.2f} GB/s): {done.out}"
    )
    console.say(f"Next: {shlex.join(['qconvert', 'parity', str(source), str(done.out)])}")
