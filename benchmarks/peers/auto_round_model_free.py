"""Round the routed experts of a checkpoint with AutoRound's model-free mode.

python auto_round_model_free.py SRC OUT SCHEME, in the environment that ``setup.sh`` makes.

Left alone it also rounds attention and linear attention; the layers to ignore leave what qconvert rounds. Without
torch.compile and with its one worker it is at its fastest here: compiled it takes 1.4 times the wall time, and two
workers gain nothing and hold two shards.
"""

from __future__ import annotations

import sys

from auto_round import AutoRound

SCHEMES = {"int4-g128": "W4A16"}
KEPT = "self_attn,linear_attn,shared_expert,shared_expert_gate,mlp.gate,mtp,visual"


def main() -> None:
    """Convert what the command line names."""
    source, out, scheme = sys.argv[1:]
    AutoRound(
        model=source,
        scheme=SCHEMES[scheme],
        ignore_layers=KEPT,
        model_free=True,
        enable_torch_compile=False,
        device_map="cpu",
    ).quantize_and_save(out)


if __name__ == "__main__":  # its workers are spawned and import this file
    main()
