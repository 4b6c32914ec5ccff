"""Round the routed experts of a checkpoint with llm-compressor's ``model_free_ptq``.

python model_free_ptq.py SRC OUT SCHEME, in the environment that ``setup.sh`` makes.

Targets name the routed experts alone, so that it rounds what qconvert rounds. One worker is its fastest way here:
torch's own threads fill the cores, and two workers are slower and hold two shards.
"""

from __future__ import annotations

import sys

from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import FP8_BLOCK, FP8_DYNAMIC, INT8_W8A8, W4A16
from llmcompressor import model_free_ptq

SCHEMES = {
    "int4-g128": W4A16,
    "int8": {"weights": INT8_W8A8["weights"]},
    "fp8": FP8_DYNAMIC,
    "fp8-block": FP8_BLOCK,
}
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"


def main() -> None:
    """Convert what the command line names."""
    source, out, scheme = sys.argv[1:]
    model_free_ptq(
        model_stub=source,
        save_directory=out,
        scheme=QuantizationScheme(**SCHEMES[scheme], targets=[EXPERTS]),
        ignore=[r"re:mtp\..*"],
        max_workers=1,
        device="cpu",
    )


if __name__ == "__main__":
    main()
