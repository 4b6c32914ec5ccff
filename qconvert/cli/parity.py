"""`qconvert parity`: what a conversion cost, and whether that is within limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import console
from qconvert.cli.options import Json, parse_duration
from qconvert.cli.parity_attribution import show_attribution
from qconvert.core.errors import UsageError
from qconvert.core.metric import Metric, Verdict
from qconvert.io.hub import resolve
from qconvert.parity.limits import bounds, named_limits, overridden
from qconvert.parity.options import ParityOptions
from qconvert.parity.outputs.document import as_document
from qconvert.parity.outputs.folder import write_report
from qconvert.parity.report import ParityReport
from qconvert.parity.run import compare
from qconvert.parity.saved import KEPT
from qconvert.texts.documents import Text

EXIT_CODES = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.AMBIGUOUS: 7}
"""By verdict; 7 says that a limit lies inside the interval of its number: more tokens decide."""

_SHOWN_CAUSES = 5
_HEADLINES = (
    ("kl_mean", "KL(original || converted), mean"),
    ("kl_median", "median"),
    ("kl_p99", "99th percentile"),
    ("top1_agreement", "same most likely token"),
    ("greedy_common_mean", "tokens in common, mean"),
    ("greedy_never_parted", "prompts that never part"),
    ("draft_acceptance_original", "drafts accepted, original"),
    ("draft_acceptance_converted", "drafts accepted, converted"),
    ("perplexity_original", "perplexity, original"),
    ("perplexity_converted", "perplexity, converted"),
)


def parity(
    original: Annotated[
        str,
        typer.Argument(
            metavar="ORIGINAL",
            help="Folder of the checkpoint as it was, a hub id, an ONNX package, or saved log-probabilities.",
        ),
    ],
    converted: Annotated[
        str,
        typer.Argument(
            metavar="CONVERTED",
            help="Folder of what it became, checkpoint or ONNX package, its log-probabilities, or states of an engine.",
        ),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="What both models read, again for each domain: text, .jsonl (messages for the chat template, text or "
            "token_ids a line) or .npy (token ids); default: the held-out texts that come along.",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to run at most; default: 10240.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that see each other.")] = 512,
    seed: Annotated[int, typer.Option(help="Of random tokens and of bootstrap intervals.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for parity.json, parity.md, report.html, junit.xml and model-card.md."),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Each layer by itself too, fed the original's inputs, and DeltaNet states."),
    ] = False,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="How often the prediction head guesses right, before and after.")
    ] = False,
    greedy: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="PROMPTS",
            help="So many prompts from the texts are continued greedily: how long both models say the same. The "
            "original is read once for each token.",
        ),
    ] = 0,
    greedy_tokens: Annotated[int, typer.Option(min=1, help="Tokens by which --greedy continues at most.")] = 32,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Restore the original by groups of roles, at most 8, and those that matter by layer: what each is "
            "worth, and policy.toml for `quantize` in the report. Says first how long that takes.",
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="For --explain, such as 30m: fewer layers where that does not suffice."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for states after each layer: a run that was killed goes on from there.")
    ] = None,
    save_logprobs: Annotated[
        Path | None,
        typer.Option(help="File for the original's likeliest tokens, to give as ORIGINAL later."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=5, help="Tokens that --save-logprobs keeps of each position.")] = KEPT,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Compare weights and do not run the models.")
    ] = False,
    limits: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|default", help="Limits as TOML, or those by scheme that come along; other options override."
        ),
    ] = None,
    max_kl_mean: Annotated[float | None, typer.Option(help="Limit in nats, as served.")] = None,
    max_kl_median: Annotated[float | None, typer.Option(help="Limit in nats, as served.")] = None,
    max_kl_p99: Annotated[float | None, typer.Option(help="Limit in nats, as served.")] = None,
    min_top1: Annotated[float | None, typer.Option(min=0, max=1, help="Smallest share of equal tokens.")] = None,
    max_perplexity_ratio: Annotated[float | None, typer.Option(help="Converted over original.")] = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Smallest SQNR of any quantized tensor, dB.")] = None,
    min_router_overlap: Annotated[
        float | None, typer.Option(min=0, max=1, help="Smallest top-k overlap of any layer's router.")
    ] = None,
    json: Json = False,
) -> None:
    """Compare a converted checkpoint with its original: weights, then both models on the same text.

    "Weights only" keeps activations as they are; "as served" rounds them as engines do for the scheme, or is what ONNX
    Runtime computes with a package, and is what limits apply to. Exit code 1 when a fault is found or a limit is
    exceeded, 7 when a limit lies inside the confidence interval of its number, so that more --tokens have to decide.

    Examples:
      qconvert parity ./Qwen3.5-35B-A3B ./int4 --report ./report

      qconvert parity ./Qwen3.5-35B-A3B ./int4 --max-kl-mean 0.02 --min-top1 0.95 --json

      qconvert parity ./Qwen3.5-35B-A3B ./int4 --limits parity.toml

      qconvert parity ./int4 ./package

      qconvert parity ./int4 engine-states.safetensors

      qconvert parity ./Qwen3.5-35B-A3B ./int4 --explain --budget 30m --work ./states --report ./report

      qconvert parity diff old/parity.json new/parity.json
    """

    def call() -> int:
        if weights_only and (text or tokens is not None or layers or drafts or greedy or explain or work is not None):
            raise UsageError(
                "--weights-only runs no model: drop --text, --tokens, --layers, --drafts, --greedy, --explain and "
                "--work"
            )
        if budget is not None and not explain:
            raise UsageError("--budget is for --explain, which is not given")
        asked = bounds(
            "given on the command line",
            kl_mean=max_kl_mean,
            kl_median=max_kl_median,
            kl_p99=max_kl_p99,
            top1_agreement=min_top1,
            perplexity_ratio=max_perplexity_ratio,
            sqnr_min=min_sqnr,
            router_overlap=min_router_overlap,
        )
        options = ParityOptions(
            texts=tuple(Text.parse(one) for one in text or ()),
            tokens=tokens or ParityOptions().tokens, window=window, seed=seed,
            limits=overridden(named_limits(limits), asked),
            run_model=not weights_only, layers=layers, drafts=drafts,
            greedy=greedy, greedy_tokens=greedy_tokens,
            explain=explain, budget=None if budget is None else parse_duration(budget), work=work,
            save_logprobs=save_logprobs, kept=top_k,
        )  # fmt: skip
        with console.progress(in_bytes=False, quiet=json) as advance:
            result = compare(
                resolve(original), resolve(converted), options, advance, (lambda line: None) if json else console.say
            )
        written = write_report(result, report) if report is not None else ()
        if json:
            console.show_json(as_document(result))
        else:
            show(result)
            for path in written:
                console.say(f"report: {path}")
        return EXIT_CODES[result.verdict]

    raise typer.Exit(console.guarded(call))


def show(result: ParityReport) -> None:
    """Causes first, then the numbers that people ask for, then the verdict and why."""
    for one in result.causes[:_SHOWN_CAUSES]:
        console.say(f"{one.severity.value} {one.kind.value}: {one}", style="red")
    if len(result.causes) > _SHOWN_CAUSES:
        console.say(f"... and {len(result.causes) - _SHOWN_CAUSES} more; --report or --json has them all")
    _show_model(result)
    changed = [role for role in result.roles if role.identical < role.tensors]
    if changed:
        table = console.plain_table("role", "scheme", ">tensors", ">SQNR dB", ">worst dB", ">cosine")
        for role in changed:
            table.add_row(
                role.path, role.scheme, f"{role.tensors:,}",
                f"{role.sqnr_db:.2f}", f"{role.worst_db:.2f}", f"{role.cosine:.6f}",
            )  # fmt: skip
        console.show(table)
    if result.attribution is not None:
        show_attribution(result.attribution)
    if result.tensors or result.identical:
        console.say(f"{result.identical:,} tensors are identical")
    for note in result.notes:
        console.say(note)
    for metric in result.metrics:
        if metric.verdict is not Verdict.PASS:
            console.say(f"{metric.verdict.value} {metric.name} of {metric.place}: {_value(metric)}", style="red")
    colour = "green" if result.verdict is Verdict.PASS else "red"
    console.say(f"verdict: {result.verdict.value}", style=f"bold {colour}")
    console.say(result.because)


def _show_model(result: ParityReport) -> None:
    modes = [where for where in ("weights only", "as served") if any(m.where == where for m in result.metrics)]
    if not modes:
        return
    found = {(metric.name, metric.where): metric for metric in result.metrics}
    table = console.plain_table("", *(f">{mode}" for mode in modes))
    for name, label in _HEADLINES:
        if (name, modes[0]) in found:
            table.add_row(label, *(_value(found[name, mode]) for mode in modes))
    console.say(f"{result.tokens:,} tokens, {result.text}")
    console.show(table)


def _value(metric: Metric) -> str:
    unit = "" if metric.unit == "count" else metric.unit
    number = f"{metric.value:.2%}" if unit == "fraction" else f"{metric.value:.5g} {unit}".rstrip()
    return number if metric.limit is None else f"{number} (limit {metric.limit:g})"
