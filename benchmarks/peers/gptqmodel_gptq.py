"""Round the routed experts of a checkpoint with GPTQModel, calibrated on given token windows.

python gptqmodel_gptq.py SRC OUT SCHEME IDS, in the environment that ``setup.sh`` makes. IDS is int64 [W, T] in .npy.
"""

from __future__ import annotations

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with fewer its pools refuse to be made

import numpy as np
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from text_copy import text_copy

SCHEMES = {
    "int4-g128": {"bits": 4, "group_size": 128},
    "int4-g32": {"bits": 4, "group_size": 32},
    "int8": {"bits": 8, "group_size": -1, "act_group_aware": False},  # its default order of groups refuses rows
    "int8-g128": {"bits": 8, "group_size": 128},
}
KEPT = (r".*self_attn.*", r".*linear_attn.*", r".*shared_expert.*", r".*mlp\.gate$", r".*visual.*", r".*mtp.*")


def main() -> None:
    """Convert what the command line names."""
    source, out, scheme, ids = sys.argv[1:]
    windows = np.load(ids)
    config = QuantizeConfig(**SCHEMES[scheme], sym=True, dynamic={f"-:{name}": {} for name in KEPT}, device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    with text_copy(source, out) as text:
        model = GPTQModel.load(text, config, backend=BACKEND.TORCH)
        model.quantize(rows, batch_size=4, backend=BACKEND.TORCH)
        model.save(out)


if __name__ == "__main__":
    main()
