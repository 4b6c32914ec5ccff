"""What an ONNX package holds: its graphs, operators of the decoder, and weights by role."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qconvert.arch.families import describe, read_config
from qconvert.cli import console
from qconvert.io.source_folder import CONFIG_FILE, MODEL_FILE, read_whole
from qconvert.io.strict_json import parse_object
from qconvert.manifest_reader import read_manifest


def inspect_package(folder: Path, *, json: bool) -> int:
    """Print it; reads the decoder's graph and the manifest, no weights.

    Raises:
        SourceError: files of the package are missing or damaged.
    """
    # Here, because onnx takes a while to import, and checkpoints do not need it.
    from qconvert.onnx_export.graph_file import read_graph

    manifest = read_manifest(folder)
    config = read_config(parse_object(read_whole(folder / CONFIG_FILE), str(folder / CONFIG_FILE)), folder)
    graph = read_graph(folder / MODEL_FILE)
    operators = Counter((node.domain or "ai.onnx", node.op_type) for node in graph.all_nodes())
    graphs = sorted(path.name for path in folder.glob("*.onnx"))
    total = sum(int(line["bytes"]) for line in manifest.decisions)
    if json:
        console.show_json(
            {
                "architecture": describe(config),
                "bytes": total,
                "package": manifest.package,
                "graphs": graphs,
                "opsets": dict(graph.opset_imports),
                "operators": [
                    {"domain": domain, "operator": name, "count": count}
                    for (domain, name), count in sorted(operators.items())
                ],
                "inputs": [str(value.name) for value in graph.inputs],
                "outputs": [str(value.name) for value in graph.outputs],
                "decisions": list(manifest.decisions),
            }
        )
        return 0
    console.say(f"{describe(config)}  {folder}  {console.gigabytes(total)}, ONNX package", style="bold")
    console.say(f"graphs: {', '.join(graphs)}")
    table = console.plain_table("weights", "as", ">tensors", ">bytes")
    for line in manifest.decisions:
        table.add_row(line["role"], line["action"], f"{line['tensors']:,}", console.gigabytes(line["bytes"]))
    console.show(table)
    table = console.plain_table("operator", "domain", ">nodes")
    for (domain, name), count in sorted(operators.items(), key=lambda pair: (pair[0][0], -pair[1])):
        table.add_row(name, domain, f"{count:,}")
    console.show(table)
    return 0
