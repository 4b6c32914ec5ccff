"""`qconvert export-onnx`: a checkpoint as a package for ONNX Runtime."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qconvert.carry_out import Conversion
from qconvert.cli import console
from qconvert.cli.options import (
    PROCESSORS,
    DryRun,
    Fresh,
    HashName,
    Jobs,
    Json,
    MaxMemory,
    MaxShardSize,
    ReadBack,
    parse_hash,
    parse_size,
)
from qconvert.cli.planned import preview, show_plan
from qconvert.core.errors import UsageError
from qconvert.core.scheme import INT8, Scheme
from qconvert.io.hub import resolve
from qconvert.plan.policy import Policy, Rule, default_policy, read_rules, scheme_named
from qconvert.plan.presets import preset_rules

SCHEMES = ("int4", "int8")

KEEP = Rule(match="*", scheme=None, reason="not quantized in the source", default=True)
"""What becomes of all that no rule of the user rounds."""


def export_onnx(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, quantized or not, or a hub id ORG/NAME.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; it appears whole or not at all.")],
    scheme: Annotated[
        str | None,
        typer.Option(help=f"Round routed experts that are not quantized in SRC: {' or '.join(SCHEMES)}."),
    ] = None,
    group: Annotated[int | None, typer.Option(help="Inputs that share an int4 scale: 32, 64 or 128 (default).")] = None,
    asymmetric: Annotated[bool, typer.Option(help="int4 with zero points.")] = False,
    search: Annotated[bool, typer.Option(help="Choose every scale by least squared error.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            help="mixed: attention, linear attention and shared expert in 8 bits; fusable: the shared expert like the "
            "routed ones, with --scheme."
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML of ordered rules, as for `quantize`, for what is not quantized in SRC.")
    ] = None,
    ops: Annotated[
        str,
        typer.Option(
            help="Operators of the graph: contrib (ONNX Runtime's own, fastest), standard (ai.onnx opset 27 alone) or "
            "functions (opset 21 and functions in the model, for runtimes that know neither)."
        ),
    ] = "contrib",
    ep: Annotated[
        str, typer.Option(help="Execution provider that shall run the package: cpu or cuda. cuda has not run on a GPU.")
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What is not in codes: float32 (default on a CPU), float16 or bfloat16 (default of cuda). On a CPU "
            "weights are stored so and everything is computed in float32."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="Round the embedding where it is not quantized in SRC: int4 (groups of 32) or int8. A tied head is "
            "the same matrix."
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Store what no operator reads as codes, such as FP8, in --dtype, and do not refuse it."
        ),
    ] = False,
    allow_scale_rounding: Annotated[
        bool,
        typer.Option(
            "--allow-scale-rounding",
            help="With --ep cuda scales are stored in --dtype; those of SRC that it does not hold are refused without "
            "this.",
        ),
    ] = False,
    accuracy_level: Annotated[
        int,
        typer.Option(
            help="Of products with integer codes in contrib operators: 0 multiplies float32 activations and is exact; "
            "4 rounds activations to 8 bits, which is several times faster. Of CPUs alone."
        ),
    ] = 4,
    fold_shared_expert: Annotated[
        bool,
        typer.Option(
            "--fold-shared-expert",
            help="Run the shared expert as routed ones, in one operator; it must be stored alike. No faster on a CPU.",
        ),
    ] = False,
    mtp: Annotated[
        bool, typer.Option("--mtp/--no-mtp", help="Export the multi-token-prediction head where SRC has one.")
    ] = True,
    vision: Annotated[
        bool,
        typer.Option(
            "--vision/--no-vision", help="Export the vision tower where SRC has one, so that prompts show images."
        ),
    ] = True,
    taps: Annotated[
        bool,
        typer.Option("--taps", help="Let the decoder give what happens in each layer as well, to look for a fault."),
    ] = False,
    last_logits: Annotated[
        bool,
        typer.Option(
            "--last-logits",
            help="Score the last token of a prompt alone: with a large vocabulary prompts take less time and memory. "
            "Not for a package whose log-probabilities are compared.",
        ),
    ] = False,
    ort_version: Annotated[
        str, typer.Option(help="Oldest ONNX Runtime that shall run the package; what it lacks is named.")
    ] = "1.31",
    dry_run: DryRun = False,
    jobs: Jobs = PROCESSORS,
    max_memory: MaxMemory = "1GiB",
    fresh: Fresh = False,
    read_back: ReadBack = True,
    max_shard_size: MaxShardSize = "5GB",
    algorithm: HashName = "xxh3-128",
    json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX package that ONNX Runtime and onnxruntime-genai run.

    int4 and int8 codes of a quantized checkpoint are carried as they are, whoever wrote it: nothing is rounded twice.
    Everything else becomes float32, or what --dtype says. The graph is model.onnx; the weights stand beside it in
    safetensors files. Like `quantize` this streams: a run that was killed or stopped by a full disk goes on when the
    same command is given again. The package holds the text decoder, the MTP head and the vision tower, each a graph of
    its own. With a tower, prompts may show images, and the decoder takes embeddings, which embedding.onnx makes.

    Examples:
      qconvert export-onnx ./int4 ./package

      qconvert export-onnx ./int4 ./package --preset mixed

      qconvert export-onnx ./Qwen3.5-35B-A3B ./package --scheme int4 --group 128 --max-memory 1500MB

      qconvert export-onnx ./int4 ./package --ep cuda --dtype bfloat16

      qconvert export-onnx ./Qwen3.5-35B-A3B-FP8 ./package --dequantize --dry-run
    """

    def call() -> int:
        # Here, because onnx takes a while to import, and no other command needs it.
        from qconvert.onnx_export.export import export_onnx as write_package
        from qconvert.onnx_export.export import plan_export
        from qconvert.onnx_export.operator_sets import operator_set
        from qconvert.onnx_export.operators import version_named
        from qconvert.onnx_export.plan import PackageOptions

        routed = _scheme(scheme, group, symmetric=not asymmetric)
        rules = (
            *(() if policy is None else read_rules(policy, search=search)),
            *(() if preset is None else _preset(preset, routed, search)),
        )
        options = PackageOptions(
            policy=_policy(routed, rules, search=search),
            ops=operator_set(ops).name,
            ep=ep,
            dtype=dtype,
            embedding=embedding,
            dequantize=dequantize,
            allow_scale_rounding=allow_scale_rounding,
            accuracy_level=accuracy_level,
            mtp=mtp,
            fold_shared_expert=fold_shared_expert,
            vision=vision,
            taps=taps,
            last_logits=last_logits,
            ort_version=version_named(ort_version),
            shard_bytes=parse_size(max_shard_size),
        )
        limit, hashes = parse_size(max_memory), parse_hash(algorithm)
        folder = resolve(source)
        if dry_run:
            preview(plan_export(folder, options, max_memory=limit), out, json=json, engines=False)
            return 0
        notes: list[str] = []
        start = time.perf_counter()
        with console.progress(in_bytes=True, quiet=json) as advance:
            done = write_package(
                folder, out, options, jobs=jobs, max_memory=limit, fresh=fresh, read_back=read_back,
                algorithm=hashes, progress=lambda now, total: advance("writing", now, total), say=notes.append,
            )  # fmt: skip
        _report(done, folder, notes, time.perf_counter() - start, json=json)
        return 0

    raise typer.Exit(console.guarded(call))


def _preset(name: str, scheme: Scheme | None, search: bool) -> tuple[Rule, ...]:
    """The rules of a preset beside routed experts in ``scheme``.

    Raises:
        UsageError: an unknown one, or one that needs a scheme.
    """
    if name == "fusable" and scheme is None:
        raise UsageError("--preset fusable rounds the shared expert like the routed ones: name their --scheme")
    return tuple(replace(rule, search=search) for rule in preset_rules(name, scheme or INT8))


def _scheme(name: str | None, group: int | None, *, symmetric: bool) -> Scheme | None:
    """What ``--scheme`` and its refinements say.

    Raises:
        UsageError: a scheme that no operator reads, or refinements of none.
    """
    if name is None:
        if group is not None or not symmetric:
            raise UsageError("--group and --asymmetric refine --scheme: name one")
        return None
    if name not in SCHEMES:
        raise UsageError(f"scheme {name!r} cannot be exported; operators read {' and '.join(SCHEMES)}")
    return scheme_named(name, group=group, symmetric=symmetric)


def _policy(scheme: Scheme | None, rules: tuple[Rule, ...], *, search: bool) -> Policy | None:
    """The rules for what is not quantized in the source; ``rules`` go first.

    Raises:
        UsageError: a search that is for nothing.
    """
    if scheme is not None:
        return default_policy(scheme, search=search, rules=rules)
    if search and not rules:
        raise UsageError("--search chooses the scales of what is rounded: name a --scheme, --preset or --policy")
    return Policy(rules=(*rules, KEEP)) if rules else None


def _report(done: Conversion, source: Path, notes: list[str], seconds: float, *, json: bool) -> None:
    if json:
        told = ("source_hash", "policy_hash", "decisions", "sqnr_db")
        console.show_json(
            {
                "out": str(done.out),
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "seconds": round(seconds, 3),
                **{key: done.record[key] for key in told},
                "source_quantization": done.plan.source_quantization,
                "notes": notes,
            }
        )
        return
    show_plan(done.plan, engines=False)
    for note in notes:
        console.say(f"note: {note}", style="yellow")
    sizes = f"{console.gigabytes(done.bytes_before)} -> {console.gigabytes(done.bytes_after)}"
    console.say(f"{sizes} in {seconds:.1f} s: {done.out}")
    if "tokenizer.json" in done.plan.side_files:
        console.say(f"Next: {shlex.join(['qconvert', 'run', str(done.out), 'Once upon a time'])}")
