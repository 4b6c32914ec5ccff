"""The shipped checkpoint is whole, loads strictly, is what its record says, and has learned."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import reference_model
from calibration.corpus import DOMAINS
from calibration.demo import BATCH, CORPUS_PYTHON, CORPUS_SHA256, RECIPE, SEED, WINDOW
from calibration.demo_checkpoint import checkpoint_tensors
from calibration.demo_config import FILES, TOKEN_IDS, VOCAB_SIZE
from calibration.demo_report import readme
from calibration.tokenizer import CHAT_TEMPLATE, load_tokenizer
from calibration.windows import cut
from reference_model.config import ModelConfig
from reference_model.load import TensorDictSource, load_weights
from reference_model.model import CausalLM
from reference_model.train import expert_shares, losses
from reference_model.vision import VisionTower, start_vision
from tests.tolerances import tolerances

LIMITS = tolerances("demo")


DEMO = Path(reference_model.__file__).parent / "demo"


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, Tensor]]:
    """Tensors by shard."""
    shards = {}
    for path in sorted(DEMO.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shards[path.name] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return shards


@pytest.fixture(scope="module")
def tensors(stored: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for shard in stored.values() for name, tensor in shard.items()}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def model(tensors: dict[str, Tensor]) -> CausalLM:
    model = CausalLM(ModelConfig.from_file(DEMO / "config.json").text)
    text = {k.removeprefix("model.language_model."): v for k, v in tensors.items() if not k.startswith("model.visual.")}
    load_weights(model, TensorDictSource(text), torch.float32)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """One window of 256 from each domain."""
    tokenizer = load_tokenizer(DEMO)
    texts = [(DEMO / "heldout" / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS]
    return torch.stack([cut(torch.tensor(tokenizer.encode(text).ids), WINDOW)[3] for text in texts])


def test_the_folder_is_a_hub_repository_of_at_most_40_mb() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    names = {path.relative_to(DEMO).as_posix() for path in files}
    assert names == {
        *FILES, *(f"heldout/{domain}.txt" for domain in DOMAINS), "README.md", "chat_template.jinja", "merges.txt",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "training.json", "vocab.json",
    }  # fmt: skip


def test_configurations_are_the_frozen_ones() -> None:
    for name, content in FILES.items():
        assert json.loads((DEMO / name).read_text(encoding="utf-8")) == content
    assert (DEMO / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_the_index_names_every_tensor_and_mtp_is_last(stored: dict[str, dict[str, Tensor]]) -> None:
    index = json.loads((DEMO / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == {name: shard for shard, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in stored.values() for t in tensors.values())
    first, last = (set(tensors) for tensors in stored.values())
    assert not any(name.startswith("mtp.") for name in first)
    assert sum(name.startswith("mtp.") for name in last) == 19


def test_everything_is_bf16_but_a_log_which_is_exact_in_both(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith("A_log") else torch.bfloat16), name
        assert torch.isfinite(tensor).all(), name
        if name.endswith("A_log"):
            assert torch.equal(tensor, tensor.bfloat16().float()), name


def test_loading_and_saving_again_gives_the_same_tensors(model: CausalLM, tensors: dict[str, Tensor]) -> None:
    config = ModelConfig.from_file(DEMO / "config.json")
    assert config.vision is not None
    tower = VisionTower(config.vision)
    start_vision(tower, SEED)
    again = checkpoint_tensors(model, tower)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]), name


def test_token_ids() -> None:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert {token: tokenizer.token_to_id(token) for token in TOKEN_IDS} == TOKEN_IDS
    for domain in DOMAINS:
        text = (DEMO / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_record_is_of_this_recipe_and_corpus(record: dict[str, Any]) -> None:
    assert record["corpus"]["sha256"] == CORPUS_SHA256
    assert record["versions"]["python"] == CORPUS_PYTHON
    assert record["seed"] == SEED
    assert record["recipe"].items() >= {**asdict(RECIPE), "batch": BATCH, "window": WINDOW}.items()
    assert (DEMO / "README.md").read_text(encoding="utf-8") == readme(record)


def test_held_out_text_is_predicted_better_than_by_counts(
    model: CausalLM, windows: Tensor, record: dict[str, Any]
) -> None:
    measured = record["measured"]
    assert measured["held_out"]["tokens"] >= 12_000
    for scores in measured["domains"].values():
        assert scores["model"] < scores["bigram"] < scores["unigram"]
    batch = losses(model, windows)
    assert batch.next_token.item() < measured["held_out"]["bigram"]
    assert batch.draft.item() < measured["held_out"]["bigram"]
    worst = max(scores["model"] for scores in measured["domains"].values())
    assert batch.next_token.item() < worst + LIMITS["loss_of_one_window"]


def test_every_expert_is_used(model: CausalLM, windows: Tensor) -> None:
    shares = expert_shares(model, [windows])
    assert shares.min() > LIMITS["expert_share_min"]
    assert shares.max() < LIMITS["expert_share_max"]


def test_greedy_text_looks_like_python(model: CausalLM) -> None:
    tokenizer = load_tokenizer(DEMO)
    ids = tokenizer.encode("import os\n\n\nclass Reader:\n    def __init__(").ids
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids).split("__init__(")[1].startswith("self")
