"""What `convert` writes, transformers loads whole and computes as our model does with the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.quantizers.quantizers_utils import should_convert_module

from qconvert.convert import convert
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, NVFP4, W8A8, Scheme, int4
from qconvert.plan.policy import Policy, Rule, default_policy, scheme_named
from qconvert.plan.presets import preset_rules
from qconvert.weights.source import CheckpointWeights
from reference_model.config import ModelConfig
from reference_model.load import load_weights
from reference_model.model import CausalLM
from tests.checkpoints import make_tiny
from tests.conftest import Prove
from tests.edits import quantization_of
from tests.tolerances import tolerances

DEMO = Path(__file__).parents[1] / "reference_model" / "demo"
LIMIT = tolerances("conversion")["kl_to_transformers"]
SCHEMES: dict[str, Scheme] = {
    "int4-g32": int4(32),
    "int4-g128": int4(128),
    "int8": scheme_named("int8"),
    "fp8": scheme_named("fp8"),
    "fp8-block": scheme_named("fp8-block"),
    "mxfp4": scheme_named("mxfp4"),
    "nf4": scheme_named("nf4"),
    "fp4": scheme_named("fp4"),
    "llm-int8": scheme_named("llm-int8"),
}


def loaded(path: Path) -> Any:
    """Dequantized by transformers to BF16, widened to float32: what it loads is proved, not its BF16 arithmetic."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not {name for name in info["unexpected_keys"] if not name.startswith("mtp.")}
    if quantization_of(path).get("quant_method") == "bitsandbytes":
        model = model.dequantize(torch.bfloat16)  # its integers would round activations as well
    with torch.no_grad():
        model(torch.arange(3, 12)[None])  # packed matrices become dense in the first forward
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_enabled = False  # weights alone; see formats/test_activations_in_transformers.py
    return torch.nn.Module.float(model)  # transformers' own refuses quantized models, though all is dense by now


def some_ids(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.text.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))


def kl_to_transformers(path: Path, ids: torch.Tensor) -> float:
    with CheckpointWeights.open(path, round_to=torch.bfloat16) as source:
        ours = CausalLM(source.config.text)
        load_weights(ours, source, torch.float32)
    with torch.no_grad():
        p = ours(ids).logits.double().log_softmax(-1)
        q = loaded(path)(ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_of_a_tiny_checkpoint(tmp_path: Path, name: str) -> None:
    config = make_tiny(tmp_path / "src", group=128)
    convert(tmp_path / "src", tmp_path / "out", default_policy(SCHEMES[name]))
    assert kl_to_transformers(tmp_path / "out", some_ids(config)) < LIMIT


ALWAYS_ACTIVE = (
    "text.attention.query.output_gate",  # by name, or four-bit floats are refused
    *(f"text.attention.{part}" for part in ("query", "key", "value", "output")),
    *(f"text.linear_attention.{part}" for part in ("qkv", "z", "output")),
    *(f"text.shared_expert.{part}" for part in ("gate", "up", "down")),
)


def always_active(scheme: Scheme, *, experts: bool, attention: bool = True) -> Policy:
    """All single matrices in ``scheme``, experts as well or not at all; tiles do not divide every attention."""
    matches = [match for match in ALWAYS_ACTIVE if attention or not match.startswith("text.attention")]
    rules = [Rule(match=match, scheme=scheme, reason="to see it loaded") for match in matches]
    if not experts:
        rules.append(Rule(match="text.expert.*", scheme=None, reason="transformers does not read them"))
    return default_policy(scheme, rules=tuple(rules))


REAL_HEADS: dict[str, tuple[Scheme, str | None, bool]] = {
    "int4-g128": (int4(128), None, True),
    "int8": (INT8, None, True),
    "fp8": (FP8, None, True),
    "fp8-block": (FP8_BLOCK, None, True),
    "mxfp4": (MXFP4, None, True),
    "w8a8": (W8A8, None, False),
    "nvfp4": (NVFP4, None, False),
    "fp8-tiles": (FP8_BLOCK, "compressed-tensors", False),
}
"""Scheme and loader of all single matrices, and whether transformers reads experts in it too."""
COMMANDS = {name: f"--scheme {name}" for name in REAL_HEADS} | {
    "int4-g128": "--scheme int4",
    "fp8-tiles": "--scheme fp8-block --format compressed-tensors",
}


@pytest.fixture(scope="module")
def real_heads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A random text-only checkpoint whose heads are as wide as those of the published models."""
    path = tmp_path_factory.mktemp("real") / "src"
    return path, make_tiny(path, naming="text", group=128, real_heads=True)


@pytest.mark.parametrize("name", REAL_HEADS)
def test_all_matrices_of_a_model_with_real_heads(
    real_heads: tuple[Path, ModelConfig], tmp_path: Path, name: str, prove: Prove
) -> None:
    source, config = real_heads
    scheme, method, experts = REAL_HEADS[name]
    policy = always_active(scheme, experts=experts)
    convert(source, tmp_path / "out", policy if method is None else policy.stored_as(method))
    assert kl_to_transformers(tmp_path / "out", some_ids(config)) < LIMIT
    version = transformers.__version__
    prove(written=COMMANDS[name], what="linears", engine="transformers", version=version, result="right")


@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8"])
def test_bitsandbytes_reads_a_model_with_real_heads(
    real_heads: tuple[Path, ModelConfig], tmp_path: Path, name: str
) -> None:
    source, config = real_heads
    convert(source, tmp_path / "out", default_policy(SCHEMES[name]))
    assert kl_to_transformers(tmp_path / "out", some_ids(config)) < LIMIT


ON_THE_DEMO: dict[str, Policy] = {name: default_policy(scheme) for name, scheme in SCHEMES.items()} | {
    "mixed": default_policy(int4(32), rules=preset_rules("mixed", int4(32))),
    "fusable": default_policy(int4(32), rules=preset_rules("fusable", int4(32))),
    "w8a8": always_active(W8A8, experts=False),
    "nvfp4": always_active(NVFP4, experts=False),
    "fp8-tiles": always_active(FP8_BLOCK, experts=False, attention=False).stored_as("compressed-tensors"),
}
"""Everything that transformers reads right, as far as it does."""
ALSO_PROVED = {name: (f"--scheme {name}", ("linears",)) for name in ("nf4", "fp4", "llm-int8")} | {
    "mixed": ("--scheme int4 --preset mixed", ("experts", "linears")),
    "fusable": ("--scheme int4 --preset fusable", ("experts", "linears")),
}


@pytest.mark.parametrize("name", ON_THE_DEMO)
def test_a_conversion_of_the_demo_checkpoint(tmp_path: Path, name: str, prove: Prove) -> None:
    convert(DEMO, tmp_path / "out", ON_THE_DEMO[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = (DEMO / "heldout" / "code.txt").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:256]])
    assert kl_to_transformers(tmp_path / "out", ids) < LIMIT
    answer = transformers.pipeline("text-generation", model=str(tmp_path / "out"), dtype=torch.bfloat16)
    prompt = "def area(width, height):\n    return"
    said = answer(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.startswith(prompt) and len(said) > len(prompt)
    written, whats = ALSO_PROVED.get(name, ("", ()))
    for what in whats:
        prove(written=written, what=what, engine="transformers", version=transformers.__version__, result="right")


@pytest.mark.parametrize("name", ["nf4", "llm-int8"])
def test_bitsandbytes_leaves_every_other_linear_module_alone(tmp_path: Path, name: str) -> None:
    convert(DEMO, tmp_path / "out", default_policy(SCHEMES[name]))
    with CheckpointWeights.open(tmp_path / "out", vision=True) as weights:
        rounded = {stored.name for stored in weights.stored.values() if stored.scheme is not None}
    skipped = quantization_of(tmp_path / "out")["llm_int8_skip_modules"]
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        model = transformers.AutoModelForImageTextToText.from_config(config)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert {name for name in linear if should_convert_module(name, skipped)} == rounded
    assert any(".visual." in name for name in linear)


def test_bitsandbytes_sees_an_image(tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "out", default_policy(SCHEMES["nf4"]))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    vision = model.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    with torch.no_grad():
        seen = model.model.visual(torch.zeros(16, patch, dtype=torch.bfloat16), grid_thw=torch.tensor([[1, 4, 4]]))
    features = seen.pooler_output if hasattr(seen, "pooler_output") else seen
    assert bool(torch.isfinite(torch.cat(list(features)) if isinstance(features, list | tuple) else features).all())
