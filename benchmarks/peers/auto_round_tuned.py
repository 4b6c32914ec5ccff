"""Round the routed experts of a checkpoint with AutoRound's learned rounding, calibrated on given token windows.

python auto_round_tuned.py SRC OUT SCHEME IDS, in the environment that ``setup.sh`` makes. IDS is int64 [W, T] in .npy.

Its 200 steps a layer on eight windows each, learning rates and learned ranges are left as they are by default; the
layers to ignore leave what qconvert rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from text_copy import text_copy

SCHEMES: dict[str, dict[str, Any]] = {
    "int4-g128": {"scheme": "W4A16"},
    "int4-g32": {"scheme": "W4A16", "group_size": 32},
    "int8": {"scheme": "W8A16", "group_size": -1},
    "int8-g128": {"scheme": "W8A16"},
}
KEPT = "self_attn,linear_attn,shared_expert,shared_expert_gate,mlp.gate,mtp,visual,lm_head"


def main() -> None:
    """Convert what the command line names."""
    source, out, scheme, ids = sys.argv[1:]
    windows = torch.from_numpy(np.load(ids))
    with text_copy(source, out) as text:
        AutoRound(
            text,
            # without a mask: it gives the first layer's to all, and that of linear attention is none for the others
            dataset=[{"input_ids": rows, "attention_mask": None} for rows in torch.split(windows, 8)],
            seqlen=windows.shape[1],
            nsamples=len(windows),
            batch_size=8,
            ignore_layers=KEPT,
            enable_torch_compile=False,
            device_map="cpu",
            **SCHEMES[scheme],
        ).quantize_and_save(out, format="auto_round")
    for made in Path(out).glob(f"{Path(text).name}*"):  # it makes a folder below the one that is asked for
        for path in made.iterdir():
            path.rename(Path(out) / path.name)
        made.rmdir()


if __name__ == "__main__":
    main()
