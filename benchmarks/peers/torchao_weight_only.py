"""Round the routed experts of a checkpoint with torchao through transformers, and run what its codes mean.

python torchao_weight_only.py SRC OUT SCHEME IDS, in the environment that ``setup.sh`` makes. IDS is an .npz with
windows one after another, ``ids``, and their ``lengths``. OUT gets ``logits.safetensors``, float32 [S, V] of all
positions that have a next token, computed in float32: its tensors are in a layout of its own.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

SCHEMES = {"int4-g128": lambda: Int4WeightOnlyConfig(group_size=128), "int8": lambda: Int8WeightOnlyConfig(version=2)}
EXPERTS = r"re:.*\.mlp\.experts\.(gate_up_proj|down_proj)"


@torch.no_grad()
def main() -> None:
    """Convert what the command line names."""
    source, out, scheme, ids = sys.argv[1:]
    # transformers tells of a scheme that cannot be made only that there were issues: one layer alone says which
    quantize_(torch.nn.Linear(128, 128, bias=False, dtype=torch.bfloat16), SCHEMES[scheme]())
    by_name = FqnToConfig(fqn_to_config=OrderedDict({EXPERTS: SCHEMES[scheme]()}))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", device_map="cpu", quantization_config=TorchAoConfig(by_name)
    )
    model.save_pretrained(out)
    # its tensors have few operators, and BF16 would add more than rounding to 8 bits costs
    exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map="cpu")
    for name, parameter in model.named_parameters():
        codes, scale = getattr(parameter, "qdata", None), getattr(parameter, "scale", None)
        if codes is not None and scale is not None:
            exact.get_parameter(name).copy_(codes.float() * scale.float())
    given = np.load(ids)
    windows = torch.split(torch.from_numpy(given["ids"]), given["lengths"].tolist())
    logits = [exact(input_ids=row[None], use_cache=False).logits[0, :-1] for row in windows]
    save_file({"logits": torch.cat(logits)}, Path(out) / "logits.safetensors")


if __name__ == "__main__":
    main()
