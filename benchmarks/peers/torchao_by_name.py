"""Round the routed experts of a checkpoint with torchao through transformers, by parameter name.

python torchao_by_name.py SRC OUT SCHEME, in the environment that ``setup.sh`` makes.

Without names torchao rounds linear modules only and leaves stacked experts as they are, in silence. The text model is
loaded whole: MTP and vision are dropped.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

SCHEMES = {"fp8": Float8WeightOnlyConfig}
EXPERTS = r"re:.*\.mlp\.experts\.(gate_up_proj|down_proj)"


def main() -> None:
    """Convert what the command line names."""
    source, out, scheme = sys.argv[1:]
    by_name = FqnToConfig(fqn_to_config=OrderedDict({EXPERTS: SCHEMES[scheme]()}))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", device_map="cpu", quantization_config=TorchAoConfig(by_name)
    )
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
