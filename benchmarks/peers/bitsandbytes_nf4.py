"""Round a checkpoint to NF4 with bitsandbytes through transformers.

python bitsandbytes_nf4.py SRC OUT SCHEME IDS, in the environment that ``setup.sh`` makes; IDS are not looked at.

It rounds linear modules, which stacked experts are not to it: there is no way to have it round what qconvert rounds.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    """Convert what the command line names."""
    source, out, _, _ = sys.argv[1:]
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]  # theirs
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="cpu", quantization_config=config)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
