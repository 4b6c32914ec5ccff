"""A whole export: open, plan, write the graph, stream the weights, publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from qconvert.arch.families import read_config
from qconvert.carry_out import Conversion, Task, carry_out
from qconvert.column_order import check_column_order
from qconvert.core.dtypes import DType
from qconvert.core.errors import OutputError, PlanError
from qconvert.core.plan import Layout, Plan
from qconvert.exact_scales import check_scales
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.hashing import XXH3
from qconvert.io.shard_writer import BACKGROUND_BYTES
from qconvert.io.source_folder import (
    EMBEDDING_FILE,
    GENAI_CONFIG,
    GENAI_PROCESSOR,
    MODEL_FILE,
    MTP_FILE,
    VISION_FILE,
)
from qconvert.memory import working_memory
from qconvert.onnx_export.embedding_graph import embedding_graph
from qconvert.onnx_export.genai_config import genai_config
from qconvert.onnx_export.genai_processor import NO_PROCESSOR, genai_processor
from qconvert.onnx_export.joining import stretch
from qconvert.onnx_export.mtp_graph import mtp_graph
from qconvert.onnx_export.operator_sets import operators_for
from qconvert.onnx_export.operators import refuse_newer, unfinished_opset
from qconvert.onnx_export.pictures import picture_tokens
from qconvert.onnx_export.plan import PackageOptions, plan_package
from qconvert.onnx_export.text_graph import text_graph
from qconvert.onnx_export.vision_graph import vision_graph
from qconvert.onnx_export.weight import Weights
from qconvert.run import Progress, check_memory


def export_onnx(
    source: Path,
    out: Path,
    options: PackageOptions,
    *,
    jobs: int = 2,
    max_memory: int | None = None,
    fresh: bool = False,
    read_back: bool = True,
    algorithm: str = XXH3,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Conversion:
    """Write the checkpoint ``source`` as an ONNX package into the new folder ``out``, whole or not at all.

    The graph is ``model.onnx``; the weights stand beside it in safetensors files, to which its external data points:
    they are read by any tool, hashed in the manifest and checked by ``qconvert verify``. Arguments as for ``convert``.

    Args:
        source: folder with a checkpoint, quantized or not.
        out: folder that does not exist yet.
        options: what is asked of the package.
        jobs: steps that run at once.
        max_memory: bytes that the whole process may hold.
        fresh: start over instead of going on from what an earlier run left.
        read_back: see ``convert``.
        algorithm: hash of the tensors in the manifest.
        progress: called with source bytes done and in all.
        say: takes a sentence for each part of the checkpoint that the package does not have.

    Raises:
        SourceError, PlanError, FormatError: see ``plan_package``.
        DataError, UsageError, OutputError, Interrupted: see ``convert``.
    """

    def decide(checkpoint: Checkpoint) -> Task:
        task = package_task(checkpoint, options)
        for note in task.notes:
            say(note)
        return task

    return carry_out(
        source,
        out,
        decide,
        jobs=jobs,
        max_memory=max_memory,
        fresh=fresh,
        read_back=read_back,
        algorithm=algorithm,
        progress=progress,
    )


def plan_export(source: Path, options: PackageOptions, *, max_memory: int | None = None) -> Plan:
    """Decide every weight of the package of ``source``; reads headers only.

    Raises:
        SourceError, PlanError, FormatError: see ``package_task``.
    """
    with Checkpoint.open(source) as checkpoint:
        plan = package_task(checkpoint, options).plan
    check_memory(plan, working_memory(max_memory, BACKGROUND_BYTES))
    return plan


def package_task(checkpoint: Checkpoint, options: PackageOptions) -> Task:
    """The weights of a package, decided, and the files beside them; reads headers only.

    Raises:
        SourceError, FormatError: see ``plan_package``.
        PlanError: also where the oldest ONNX Runtime that shall run it lacks an operator.
        UsageError: operators of an unknown name.
    """
    planned = plan_package(checkpoint, options)
    check_column_order(planned.plan, checkpoint)
    if options.precision.scales is not DType.F32:
        check_scales(planned.plan, checkpoint)
    config = read_config(planned.plan.config, checkpoint.path)
    weights, layers = Weights(of=planned.weights), planned.mtp_layers
    precision = options.precision
    operators, level = operators_for(options.ops, precision), options.accuracy_level
    tower = config.vision if planned.vision else None
    models = {
        MODEL_FILE: text_graph(
            config.text,
            weights,
            operators,
            accuracy_level=level,
            cache=precision.cache,
            hidden=bool(layers),
            embedded=tower is not None,
            taps=options.taps,
            last_logits=options.last_logits,
        )
    }
    if layers:
        models[MTP_FILE] = mtp_graph(
            config.text, weights, operators, layers=layers, accuracy_level=level, cache=precision.cache
        )
    processor = None
    if tower is not None:
        models[VISION_FILE] = vision_graph(tower, weights, operators)
        models[EMBEDDING_FILE] = embedding_graph(weights, operators, picture_tokens(config))
        processor = genai_processor(tower, checkpoint.path)
    for model in models.values():
        refuse_newer(model.graph, options.ort_version, precision.ep)
        point_to(model, planned.plan.layout)
    return Task(
        plan=planned.plan,
        beside={
            **{name: ir.to_proto(model).SerializeToString(deterministic=True) for name, model in models.items()},
            GENAI_CONFIG: _json(
                genai_config(config, checkpoint.path, mtp_layers=layers, vision=tower, ep=precision.ep)
            ),
            **({} if processor is None else {GENAI_PROCESSOR: _json(processor)}),
        },
        policy=() if options.policy is None else options.policy.entries(),
        package=options.entry,
        notes=(
            *planned.left_out,
            *([NO_PROCESSOR] if tower is not None and processor is None else []),
            *unfinished_opset(operators.opset, options.ort_version),
        ),
        accept=refuse_invalid,
    )


def point_to(model: ir.Model, layout: Layout) -> None:
    """Give every initializer without numbers its place in the weight files.

    Raises:
        PlanError: there is none.
    """
    infos = {info.name: info for info in layout.tensors}
    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.dtype is not None and isinstance(value.shape, ir.Shape):
            found = stretch(name, infos)
            if found is None:
                raise PlanError(f"the tensors of {name} do not follow each other in one file of the package")
            value.const_value = ir.ExternalTensor(*found, value.dtype, shape=value.shape, name=name)


def refuse_invalid(folder: Path) -> None:
    """Have ONNX's own checker look at the graphs before the package appears.

    Raises:
        OutputError: it found a fault.
    """
    for path in sorted(folder.glob("*.onnx")):
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise OutputError(f"{path}: onnx.checker refuses the graph: {error}") from error


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
