"""Write a random checkpoint with the layer shapes of a public size: what converters are timed on.

    python benchmarks/make_synthetic.py OUT [--size 35b-a3b] [--layers 2] [--mtp] [--vision] [--per-expert] [--holes]

Weights are Gaussian in BF16, drawn piece by piece from a generator that is seeded by the tensor's name and the
piece's number: the same options give the same bytes, in a few hundred megabytes of memory. Two layers of 35B are
5.3 GB, of which embedding and head are 2.0 GB. ``--holes`` writes true headers over files of holes instead, which take
no disk: enough to plan with, at any size.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qconvert.arch.names import Naming, name_of
from qconvert.arch.shapes import expected_roles, expected_shape
from qconvert.core.dtypes import DType
from qconvert.core.errors import QconvertError
from qconvert.core.plan import Layout
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.safetensors_header import serialize_header
from qconvert.io.shard_writer import PYTORCH_METADATA, ShardWriter
from qconvert.io.source_folder import INDEX_FILE
from qconvert.plan.layout import OutputTensor, lay_out
from reference_model.config import LayerType, ModelConfig, TextConfig, VisionConfig
from reference_model.presets import PRESETS

PIECE = 1 << 24
"""Elements drawn at once."""

SHARD_BYTES = 1_000_000_000


def _tiny(config: ModelConfig, experts: int) -> ModelConfig:
    """The same kinds of tensors, each as small as a group of 128 inputs lets it be."""
    text = replace(
        config.text,
        vocab_size=512,
        hidden_size=128,
        num_attention_heads=2,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=256,
    )
    return replace(config, text=text, vision=None)


def _few(config: ModelConfig) -> ModelConfig:
    """The same matrices, but 16 experts and 2,048 words: 0.16 GB a layer, for what takes long on each expert."""
    return replace(config, text=replace(config.text, vocab_size=2048, num_experts=16), vision=None)


def _experts(config: ModelConfig) -> ModelConfig:
    """The same layers with 2,048 words: 1.7 GB a layer, for what takes all experts of a layer."""
    return replace(config, text=replace(config.text, vocab_size=2048), vision=None)


SIZES = {
    **PRESETS,
    "tiny": _tiny(PRESETS["35b-a3b"], 8),
    "many": _tiny(PRESETS["35b-a3b"], 512),
    "few": _few(PRESETS["35b-a3b"]),
    "experts": _experts(PRESETS["35b-a3b"]),
}
"""The public sizes, one to try programs on, one of many steps that have little to do, and two for what experts take."""


def shrink(config: ModelConfig, layers: int, *, mtp: bool, vision: bool) -> ModelConfig:
    """The same shapes with ``layers`` decoder layers, every fourth and the last of them with full attention."""
    types: tuple[LayerType, ...] = tuple(
        "full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)
    )
    text = replace(
        config.text,
        num_hidden_layers=layers,
        layer_types=types,
        mtp_num_hidden_layers=config.text.mtp_num_hidden_layers if mtp else 0,
    )
    return replace(config, text=text, vision=config.vision if vision else None)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The nested ``config.json`` that reads back as ``config``."""
    result: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": _text_json(config.text),
    }
    if config.vision is not None:
        result["vision_config"] = _vision_json(config.vision)
    return result


def _text_json(c: TextConfig) -> dict[str, Any]:
    skipped = {"rope", "eos_token_ids", "layer_types"}
    return {
        "model_type": "qwen3_5_moe_text",
        **{name: getattr(c, name) for name in c.__slots__ if name not in skipped},
        "layer_types": list(c.layer_types),
        "eos_token_id": list(c.eos_token_ids),
        "hidden_act": "silu",
        "rope_parameters": {
            **{name: value for name in c.rope.__slots__ if (value := getattr(c.rope, name)) is not None},
            "mrope_section": list(c.rope.mrope_section),
            "mrope_interleaved": True,
        },
    }


def _vision_json(c: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe_vision",
        **{name: getattr(c, name) for name in c.__slots__ if name != "rope_theta"},
        "rope_parameters": {"rope_type": "axial", "rope_theta": c.rope_theta},
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
    }


def fill(writer: ShardWriter, info: TensorInfo, *, std: float, seed: int) -> None:
    """Draw a tensor and write it."""
    whole = writer.piece(info.name)
    for begin in range(0, info.numel, PIECE):
        gen = torch.Generator().manual_seed(zlib.crc32(f"{seed} {info.name} {begin}".encode()))
        piece = torch.empty(min(PIECE, info.numel - begin), dtype=torch.bfloat16)
        whole.append(piece.normal_(0.0, std, generator=gen))
    writer.commit(info.name, [whole])


def lay_out_source(config: ModelConfig, *, per_expert: bool = False, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Every tensor that ``config`` asks for, in BF16."""
    return lay_out(
        (
            (OutputTensor(name=name_of(role, Naming.VISION_LANGUAGE), dtype=DType.BF16, shape=shape),)
            for role in expected_roles(config, stacked=not per_expert)
            for shape in (expected_shape(role, config),)
        ),
        shard_bytes,
    )


def make_holes(
    out: Path,
    config: ModelConfig,
    config_json: dict[str, Any],
    *,
    per_expert: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write headers, index and configuration; weights are holes in files of the right length.

    Raises:
        FileExistsError: ``out`` is there.
    """
    layout = lay_out_source(config, per_expert=per_expert, shard_bytes=shard_bytes)
    out.mkdir(parents=True)
    for shard, infos in layout.by_file().items():
        with (out / shard).open("wb") as file:
            file.write(serialize_header(infos, PYTORCH_METADATA))
            file.truncate(infos[-1].end)
    index = {
        "metadata": {"total_size": layout.nbytes},
        "weight_map": {info.name: info.shard for info in layout.tensors},
    }
    (out / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(config_json, indent=2), encoding="utf-8")
    return layout.nbytes


def make(
    out: Path,
    config: ModelConfig,
    *,
    per_expert: bool = False,
    shard_bytes: int = SHARD_BYTES,
    std: float = 0.02,
    seed: int = 0,
    jobs: int = 2,
) -> int:
    """Write the checkpoint and return the bytes of its tensors.

    Raises:
        OutputError: ``out`` exists, or the disk refuses.
    """
    layout = lay_out_source(config, per_expert=per_expert, shard_bytes=shard_bytes)
    torch.set_num_threads(1)
    with ShardWriter(out, layout) as writer:
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(fill, writer, info, std=std, seed=seed) for info in layout.tensors]:
                done.result()
        writer.finish({"config.json": json.dumps(config_json(config), indent=2).encode()})
    return layout.nbytes


def main() -> None:
    """Parse, write, say what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="35b-a3b")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s; 0 for all of the size")
    parser.add_argument("--mtp", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--vision", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--per-expert", action="store_true", help="one matrix an expert instead of stacked ones")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--holes", action="store_true", help="true headers over files of holes: to plan with")
    parser.add_argument("--std", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="default: %(default)s; 0 for all of the size")
    options = parser.parse_args()
    if options.layers < 0:
        parser.error("--layers should be 1 or more, or 0 for all")
    whole = SIZES[options.size]
    layers = options.layers or whole.text.num_hidden_layers
    config = shrink(whole, layers, mtp=options.mtp, vision=options.vision)
    stored = {"per_expert": options.per_expert, "shard_bytes": options.shard_bytes}
    begun = time.perf_counter()
    try:
        if options.holes:
            nbytes = make_holes(options.out, config, config_json(config), **stored)
        else:
            nbytes = make(options.out, config, std=options.std, seed=options.seed, jobs=options.jobs, **stored)
    except FileExistsError as error:
        parser.error(f"{options.out}: {error.strerror}")
    except QconvertError as error:
        parser.exit(error.exit_code, f"{error}\n")
    print(f"{options.out}: {nbytes / 1e9:.2f} GB in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
