"""vLLM loads what we write and computes what our reference model computes with the same weights.

Slow; excluded by default; `make test-engines` makes vLLM's environment and runs them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, NVFP4, W8A8, Scheme, int4
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.plan.presets import preset_rules
from tests.checkpoints import save_checkpoint, tiny_config, tiny_tensors
from tests.conftest import Prove
from tests.edits import edit_quantization, edit_tensors, quantization_of, round_inputs_to_four_bits
from tests.engines.engine import Loaded, load_in_vllm
from tests.tolerances import tolerances

pytestmark = pytest.mark.engines

LIMITS = tolerances("engines")

SHARED = ("text.shared_expert.*",)
LINEAR_ATTENTION = tuple(f"text.linear_attention.{part}" for part in ("qkv", "z", "output"))
ATTENTION = tuple(f"text.attention.{part}" for part in ("query", "key", "value", "output"))
GATE = ("text.attention.query.output_gate",)  # by name, or four-bit floats are refused


def always_active(scheme: Scheme, matches: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(match=match, scheme=scheme, reason="to see it loaded") for match in matches)


# The demo has 4 layers, the last with full attention, so 4 blocks of experts. vLLM stacks q, k, v; gate, up; qkv, z.
POLICIES: dict[str, tuple[Policy, dict[str, int]]] = {
    "int4-g32": (default_policy(int4(32)), {"CompressedTensorsWNA16MoEMethod": 4}),
    "int4-g128": (default_policy(int4(128)), {"CompressedTensorsWNA16MoEMethod": 4}),
    "int4-fusable": (
        default_policy(int4(32), rules=preset_rules("fusable", int4(32))),
        {"CompressedTensorsWNA16MoEMethod": 4, "CompressedTensorsWNA16": 4 * 2},
    ),
    "int4-g32-asym": (default_policy(int4(32, symmetric=False)), {"CompressedTensorsWNA16MoEMethod": 4}),
    "int8-everywhere": (
        default_policy(INT8, rules=always_active(INT8, SHARED + LINEAR_ATTENTION + ATTENTION)),
        {"CompressedTensorsWNA16MoEMethod": 4, "CompressedTensorsWNA16": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "int4-everywhere": (
        default_policy(int4(32), rules=always_active(int4(32), SHARED + LINEAR_ATTENTION + ATTENTION)),
        {"CompressedTensorsWNA16MoEMethod": 4, "CompressedTensorsWNA16": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "w8a8-everywhere": (
        default_policy(W8A8, rules=always_active(W8A8, SHARED + LINEAR_ATTENTION + ATTENTION)),
        {"CompressedTensorsW8A8Int8MoEMethod": 4, "CompressedTensorsW8A8Int8": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "mxfp4-everywhere": (
        default_policy(MXFP4, rules=always_active(MXFP4, GATE + SHARED + LINEAR_ATTENTION + ATTENTION)),
        {"CompressedTensorsW4A4Mxfp4MoEMethod": 4, "CompressedTensorsW4A4Mxfp4": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "nvfp4-everywhere": (
        default_policy(NVFP4, rules=always_active(NVFP4, GATE + SHARED + LINEAR_ATTENTION + ATTENTION)),
        {"CompressedTensorsW4A4Nvfp4MoEMethod": 4, "CompressedTensorsW4A4Fp4": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "gptq": (default_policy(int4(32)).stored_as("gptq"), {"AutoGPTQMoEMethod": 4}),
    "gptq-int8-everywhere": (
        default_policy(INT8, rules=always_active(INT8, SHARED + LINEAR_ATTENTION + ATTENTION)).stored_as("gptq"),
        {"AutoGPTQMoEMethod": 4, "AutoGPTQLinearMethod": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "awq": (default_policy(int4(32, symmetric=False)).stored_as("awq"), {"AutoAWQMoEMethod": 4}),
    "awq-everywhere": (
        default_policy(int4(32), rules=always_active(int4(32), SHARED + LINEAR_ATTENTION + ATTENTION)).stored_as("awq"),
        {"AutoAWQMoEMethod": 4, "AutoAWQMarlinLinearMethod": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "fp8-tiles": (default_policy(FP8_BLOCK).stored_as("compressed-tensors"), {"CompressedTensorsW8A8Fp8MoEMethod": 4}),
    "fp8": (default_policy(FP8), {"CompressedTensorsW8A8Fp8MoEMethod": 4}),
    "fp8-block": (default_policy(FP8_BLOCK), {"Fp8MoEMethod": 4}),
    "int4-and-int8": (
        default_policy(int4(32), rules=preset_rules("mixed", int4(32))),
        {"CompressedTensorsWNA16MoEMethod": 4, "CompressedTensorsWNA16": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    "fp8-everywhere": (
        default_policy(FP8, rules=always_active(FP8, SHARED + LINEAR_ATTENTION + ATTENTION)),
        {"CompressedTensorsW8A8Fp8MoEMethod": 4, "CompressedTensorsW8A8Fp8": 4 * 2 + 3 * 2 + 1 * 2},
    ),
    # tiles do not divide the demo's keys and values
    "fp8-block-everywhere": (
        default_policy(FP8_BLOCK, rules=always_active(FP8_BLOCK, SHARED + LINEAR_ATTENTION)),
        {"Fp8MoEMethod": 4, "Fp8LinearMethod": 4 * 2 + 3 * 2},
    ),
    "fp8-tiles-everywhere": (
        default_policy(FP8_BLOCK, rules=always_active(FP8_BLOCK, SHARED + LINEAR_ATTENTION)).stored_as(
            "compressed-tensors"
        ),
        {"CompressedTensorsW8A8Fp8MoEMethod": 4, "CompressedTensorsW8A8Fp8": 4 * 2 + 3 * 2},
    ),
}
"""What is converted, and how many layers vLLM must have read as quantized, by the class that reads them."""

ALWAYS = SHARED + LINEAR_ATTENTION + ATTENTION
REAL_HEADS: dict[str, tuple[Policy, str, str]] = {
    "gptq": (
        default_policy(int4(128), rules=always_active(int4(128), ALWAYS)).stored_as("gptq"),
        "AutoGPTQMoEMethod",
        "AutoGPTQLinearMethod",
    ),
    "awq": (
        default_policy(int4(128), rules=always_active(int4(128), ALWAYS)).stored_as("awq"),
        "AutoAWQMoEMethod",
        "AutoAWQMarlinLinearMethod",
    ),
    "nvfp4": (
        default_policy(NVFP4, rules=always_active(NVFP4, GATE + ALWAYS)),
        "CompressedTensorsW4A4Nvfp4MoEMethod",
        "CompressedTensorsW4A4Fp4",
    ),
    "fp8-block": (
        default_policy(FP8_BLOCK, rules=always_active(FP8_BLOCK, ALWAYS)),
        "Fp8MoEMethod",
        "Fp8LinearMethod",
    ),
}
"""Everything of a random model whose heads are as wide as those of the published ones, and the classes that read it.

It has three layers, the second with full attention.
"""


VLLM = "0.32.0"
COMMANDS = {
    "int4-g32": "--scheme int4",
    "int4-g128": "--scheme int4",
    "int4-everywhere": "--scheme int4",
    "int4-and-int8": "--scheme int4 --preset mixed",
    "int4-fusable": "--scheme int4 --preset fusable",
    "int4-g32-asym": "--scheme int4 --asymmetric",
    "int8-everywhere": "--scheme int8",
    "w8a8-everywhere": "--scheme w8a8",
    "mxfp4-everywhere": "--scheme mxfp4",
    "nvfp4-everywhere": "--scheme nvfp4",
    "fp8-everywhere": "--scheme fp8",
    "fp8-block-everywhere": "--scheme fp8-block",
    "fp8-tiles": "--scheme fp8-block --format compressed-tensors",
    "fp8-tiles-everywhere": "--scheme fp8-block --format compressed-tensors",
    "gptq": "--scheme int4 --format gptq",
    "gptq-int8-everywhere": "--scheme int8 --format gptq",
    "awq": "--scheme int4 --asymmetric --format awq",
    "awq-everywhere": "--scheme int4 --format awq",
}
"""How `qconvert quantize` is asked for what a policy writes."""


WITH_LINEARS = ("everywhere", "int4-and-int8", "int4-fusable")
"""Those in which more than experts is rounded."""

FOUR_BITS = "nvfp4 with four-bit inputs"


def swap_gate_and_up(tensors: dict[str, Tensor]) -> None:
    for gate in [name for name in tensors if ".mlp.experts." in name and ".gate_proj.weight_" in name]:
        up = gate.replace(".gate_proj.", ".up_proj.")
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def drop_a_layer_s_up(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layers.2.mlp.experts." in name and ".up_proj." in name]:
        del tensors[name]


def double_a_layer_s_scales(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if ".layers.1.mlp.experts." in name and name.endswith("down_proj.weight_scale"):
            tensors[name] = tensor * 2


def forget_mtp(path: Path) -> None:
    edit_quantization(path, ignore=[entry for entry in quantization_of(path)["ignore"] if "mtp" not in entry])


def forget(path: Path, field: str, entry: str) -> None:
    entries = quantization_of(path)[field]
    assert entry in entries
    edit_quantization(path, **{field: [one for one in entries if one != entry]})


LISTED = "modules_to_not_convert"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    "gate and up of all experts swapped": ("int4-g128", lambda path: edit_tensors(path, swap_gate_and_up), None),
    "a layer's up missing": ("int4-g128", lambda path: edit_tensors(path, drop_a_layer_s_up), None),
    "a layer's scales doubled": ("int4-g128", lambda path: edit_tensors(path, double_a_layer_s_scales), None),
    "nothing ignored": ("int4-g128", lambda path: edit_quantization(path, ignore=[]), "visual"),
    "everything converted": (
        "fp8-block",
        lambda path: edit_quantization(path, modules_to_not_convert=[]),
        "not initialized from checkpoint.*visual",
    ),
    "one entry short, of names": (
        "fp8-block",
        lambda path: forget(path, LISTED, "model.language_model.layers.0.linear_attn.in_proj_a"),
        "some but not all shards of .*layers.0.linear_attn.in_proj_ba",
    ),
    "one entry short, of parts of names": (
        "awq",
        lambda path: forget(path, LISTED, ".linear_attn.out_proj"),
        "no module or parameter named 'layers.0.linear_attn.out_proj.weight'",
    ),
    "MTP not ignored": ("int4-g128", forget_mtp, r"fc\.weight.* in Qwen3_5MultiTokenPredictor"),
}
"""What is damaged, how, and what vLLM says; ``None`` where it says nothing and answers with wrong numbers."""


DRAFTS = {
    f"draft of {name}": name for name in ("original", "int4-g32", "int4-and-int8", "fp8", "fp8-block", "gptq", "awq")
}
DRAFTING = {*DRAFTS, "MTP not ignored"}
"""Where not the model but its MTP head is asked: vLLM reads it as a second model, only for drafts."""


def text_only(path: Path, *, real_heads: bool = False) -> None:
    """A random checkpoint as people have them too: no vision tower, other names, experts one by one."""
    config = tiny_config(naming="text", group=128, real_heads=real_heads)
    config |= {"linear_value_head_dim": 128, "dtype": "bfloat16"}
    tensors = tiny_tensors(config, layout="per-expert")
    save_checkpoint(path, config, {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Loaded]:
    """Every checkpoint of this file in vLLM, the faulty ones compared with what they should have been."""
    root = tmp_path_factory.mktemp("vllm")
    checkpoints = {"original": CHECKPOINT}
    for name, (policy, _) in POLICIES.items():
        checkpoints[name] = convert(CHECKPOINT, root / name, policy, max_memory=4 << 30).out
    text_only(root / "text-original")
    checkpoints["text-original"] = root / "text-original"
    text = convert(root / "text-original", root / "text-int4-g32", default_policy(int4(32)), max_memory=4 << 30)
    checkpoints["text-int4-g32"] = text.out
    text_only(root / "real-original", real_heads=True)
    checkpoints["real-original"] = root / "real-original"
    for name, (policy, *_) in REAL_HEADS.items():
        done = convert(root / "real-original", root / f"real-{name}", policy, max_memory=4 << 30)
        checkpoints[f"real-{name}"] = done.out
    checkpoints[FOUR_BITS] = shutil.copytree(checkpoints["nvfp4-everywhere"], root / "four-bit-inputs")
    round_inputs_to_four_bits(checkpoints[FOUR_BITS])
    checkpoints |= {draft: checkpoints[name] for draft, name in DRAFTS.items()}
    intended = {}
    for number, (fault, (name, damage, _)) in enumerate(FAULTS.items()):
        checkpoints[fault] = shutil.copytree(checkpoints[name], root / f"fault-{number}")
        damage(checkpoints[fault])
        intended[fault] = checkpoints[name]
    return load_in_vllm(checkpoints, root / "results", intended=intended, drafting=DRAFTING)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(loaded: Loaded, weights: str) -> None:
    assert loaded.error is None
    kl = loaded.divergence()
    assert float(kl.median()) <= LIMITS[f"{weights}_kl_median"]
    assert float(kl.mean()) <= LIMITS[f"{weights}_kl_mean"]


def test_unquantized_weights_mean_the_same_to_both(loads: Mapping[str, Loaded]) -> None:
    check(loads["original"], "demo")
    check(loads["text-original"], "random")
    check(loads["real-original"], "random")
    assert not any(loads[name].emulated for name in ("original", "text-original", "real-original"))


@pytest.mark.parametrize("name", POLICIES)
def test_a_conversion_is_read_as_it_was_meant(loads: Mapping[str, Loaded], name: str, prove: Prove) -> None:
    check(loads[name], "demo")
    assert loads[name].emulated == POLICIES[name][1]
    for what in ("experts", "linears") if name.endswith(WITH_LINEARS) else ("experts",):
        if name in COMMANDS:
            prove(written=COMMANDS[name], what=what, engine="vLLM", version=VLLM, result="loads right")


def test_four_bit_inputs_are_read_with_their_scales(loads: Mapping[str, Loaded]) -> None:
    """As others write them; what they do is in test_vllm_kernels.py."""
    check(loads[FOUR_BITS], "demo")
    assert loads[FOUR_BITS].emulated == POLICIES["nvfp4-everywhere"][1]


def test_a_text_only_conversion_is_read_as_it_was_meant(loads: Mapping[str, Loaded]) -> None:
    check(loads["text-int4-g32"], "random")
    assert loads["text-int4-g32"].emulated == {"CompressedTensorsWNA16MoEMethod": 3}


@pytest.mark.parametrize("name", REAL_HEADS)
def test_heads_of_real_width_are_read_as_they_were_meant(loads: Mapping[str, Loaded], name: str, prove: Prove) -> None:
    _, experts, linear = REAL_HEADS[name]
    check(loads[f"real-{name}"], "random")
    assert loads[f"real-{name}"].emulated == {experts: 3, linear: 3 * 2 + 2 * 2 + 1 * 2}
    asked = f"--scheme int4 --format {name}" if name in ("gptq", "awq") else f"--scheme {name}"
    for what in ("experts", "linears"):
        prove(written=asked, what=what, engine="vLLM", version=VLLM, result="loads right")


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_mtp_head_is_carried_as_vllm_reads_it(loads: Mapping[str, Loaded], draft: str) -> None:
    check(loads[draft], "draft")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_checkpoint_does_not_pass(loads: Mapping[str, Loaded], fault: str) -> None:
    loaded, message = loads[fault], FAULTS[fault][2]
    if message is None:
        assert loaded.error is None
        with pytest.raises(AssertionError):
            check(loaded, "demo")
    else:
        assert re.search(message, loaded.error or "")
