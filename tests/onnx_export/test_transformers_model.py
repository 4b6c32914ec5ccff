"""transformers' ``generate`` over a package gives what it gives over the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from qconvert.cli.demo import CHECKPOINT
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.transformers_model import PackageForCausalLM
from tests.onnx_export.packages import EXACT, error
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp32_logits"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> PackageForCausalLM:
    folder = tmp_path_factory.mktemp("package") / "demo"
    export_onnx(CHECKPOINT, folder, EXACT)
    return PackageForCausalLM.from_pretrained(folder, threads=1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def test_greedy_and_sampled_continuations_of_a_padded_batch_are_transformers_own(
    package: PackageForCausalLM, model: torch.nn.Module
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    batch = tokenizer(["The river", "In the beginning was the Word, and", "1 +"], return_tensors="pt", padding=True)
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}):
        answers = []
        for one in (package, model):
            torch.manual_seed(3)
            answers.append(one.generate(**batch, max_new_tokens=16, min_new_tokens=16, **options))
        assert torch.equal(*answers)
        assert answers[0].shape[1] == batch["input_ids"].shape[1] + 16


def test_a_prompt_longer_than_one_piece_is_gone_on_from(package: PackageForCausalLM, model: torch.nn.Module) -> None:
    ids = torch.randint(0, 2000, (1, 700), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "max_new_tokens": 5}
    assert torch.equal(package.generate(ids, **options), model.generate(ids, **options))


def test_what_would_cut_the_cache_back_is_refused(package: PackageForCausalLM) -> None:
    with pytest.raises(ValueError, match="stateful"):
        package.generate(torch.tensor([[1, 2, 3, 1, 2, 3]]), max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_image_prompts_are_gone_on_from_as_by_transformers(package: PackageForCausalLM) -> None:
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    draw = np.random.default_rng(2)
    pictures = [draw.integers(0, 255, size, dtype=np.uint8) for size in ((64, 96, 3), (40, 130, 3))]
    seen = AutoImageProcessor.from_pretrained(CHECKPOINT)(images=pictures, return_tensors="pt")
    tokens = (seen["image_grid_thw"].prod(-1) // 4).tolist()
    rows = [[5, 6, 2043, *[2046] * count, 2044, 7, 8] for count in tokens]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, **seen}
    options["mm_token_type_ids"] = (ids == 2046).long()
    expected = model.generate(ids, **options)
    assert torch.equal(package.generate(ids, **options), expected)
    other = package.generate(ids, **options | {"pixel_values": -seen["pixel_values"]})
    assert not torch.equal(other, expected)


def test_images_of_a_second_turn_are_seen(package: PackageForCausalLM) -> None:
    draw = np.random.default_rng(3)
    picture = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    seen = AutoImageProcessor.from_pretrained(CHECKPOINT)(images=[picture], return_tensors="pt")
    turns = [[5, 6, 7], [8, 2043, *[2046] * 4, 2044, 9]]
    first = package(torch.tensor(turns[:1]))
    second = package(torch.tensor(turns[1:]), past_key_values=first.past_key_values, **seen)
    whole = package(torch.tensor([turns[0] + turns[1]]), **seen)
    assert error(second.logits.numpy(), whole.logits[:, 3:].numpy()) < LOGITS
