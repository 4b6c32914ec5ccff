"""What engines read beside the weights is compared too, by what it says and not by how it is written."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from qconvert.core.metric import Verdict
from qconvert.core.scheme import INT8
from qconvert.parity.causes import Cause, CauseKind, Severity
from qconvert.parity.run import ParityOptions, compare
from qconvert.parity.serving import OTHER_FILES, config_causes, serving_causes
from reference_model.config import ModelConfig, TextConfig, VisionConfig
from reference_model.config_rope import RopeParameters
from tests.checkpoints import tiny_config
from tests.conftest import Converted

FILES: dict[str, str] = {
    "tokenizer.json": '{"model": {"vocab": {"a": 0, "b": 1}}}',
    "chat_template.jinja": "{{ messages }}",
    **{name: '{"a": 1, "b": [2]}' for name in OTHER_FILES if name.endswith(".json")},
    "merges.txt": "a b\n",
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for side in ("original", "converted"):
        (tmp_path / side).mkdir()
        for name, text in FILES.items():
            (tmp_path / side / name).write_text(text, encoding="utf-8")
    return tmp_path / "original", tmp_path / "converted"


def only(folders: tuple[Path, Path]) -> Cause:
    (found,) = serving_causes(*folders)
    assert found.kind is CauseKind.SERVING
    return found


def test_equal_folders_have_no_cause(folders: tuple[Path, Path]) -> None:
    assert list(serving_causes(*folders)) == []


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, folders: tuple[Path, Path]) -> None:
    (folders[1] / name).unlink()
    found = only(folders)
    needed = name in ("tokenizer.json", "chat_template.jinja")
    assert (found.where, found.severity) == (name, Severity.ERROR if needed else Severity.WARNING)
    assert "is missing" in found.evidence


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_says_something_else(name: str, folders: tuple[Path, Path]) -> None:
    text = '{"a": 2, "b": [2], "c": 0}' if name.endswith(".json") else "other"
    (folders[1] / name).write_text(text, encoding="utf-8")
    found = only(folders)
    assert (found.where, found.severity) == (name, Severity.WARNING)
    assert "differs from the original's" in found.evidence
    assert found.evidence.endswith(": a, c") is (name in OTHER_FILES and name.endswith(".json"))


@pytest.mark.parametrize("name", FILES)
def test_what_the_original_lacks_is_not_missed(name: str, folders: tuple[Path, Path]) -> None:
    (folders[0] / name).unlink()
    assert list(serving_causes(*folders)) == []


def test_json_that_is_written_otherwise_is_the_same(folders: tuple[Path, Path]) -> None:
    for name in FILES:
        if name.endswith(".json"):
            parsed = json.loads(FILES[name])
            text = json.dumps(dict(reversed(parsed.items())) | {"transformers_version": "9"}, indent=3)
            (folders[1] / name).write_text(text, encoding="utf-8")
    assert list(serving_causes(*folders)) == []


@pytest.mark.parametrize("home", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_may_live_in_another_file(home: str, folders: tuple[Path, Path]) -> None:
    content: dict[str, Any] = json.loads(FILES["tokenizer_config.json"]) if home in FILES else {}
    for ours, theirs in (folders, folders[::-1]):
        (ours / "chat_template.jinja").write_text(FILES["chat_template.jinja"], encoding="utf-8")
        (theirs / "chat_template.jinja").unlink()
        (theirs / home).write_text(
            json.dumps(content | {"chat_template": FILES["chat_template.jinja"]}), encoding="utf-8"
        )
        assert list(serving_causes(*folders)) == []


def test_files_that_are_no_json_are_compared_as_bytes(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        (folder / "generation_config.json").write_bytes(b"\xff{")
        (folder / "chat_template.jinja").unlink()
        (folder / "tokenizer_config.json").write_bytes(b"[1]")
    assert list(serving_causes(*folders)) == []
    (folders[1] / "generation_config.json").write_bytes(b"\xff{ ")
    assert only(folders).evidence == "differs from the original's"


@pytest.mark.parametrize("name", ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"])
@pytest.mark.parametrize("value", [None, 5])
def test_ids_of_images_and_videos(name: str, value: int | None) -> None:
    ours = ModelConfig.from_dict(tiny_config())
    (found,) = config_causes(ours, replace(ours, **{name: value}))
    assert (found.kind, found.severity, found.where) == (CauseKind.CONFIG, Severity.ERROR, "config.json")
    assert found.evidence == f"{name} is {value or 'missing'}, the original has {getattr(ours, name)}"


def test_every_field_of_the_configuration_counts() -> None:
    ours = ModelConfig.from_dict(tiny_config())
    assert list(config_causes(ours, ours)) == []
    assert ours.vision is not None
    silent = {"initializer_range", "router_aux_loss_coef"}
    warned = {"eos_token_ids", "max_position_embeddings", "mtp_num_hidden_layers"}
    for one in fields(TextConfig):
        other = {"rope": RopeParameters(rope_theta=7.0), "layer_types": (), "eos_token_ids": (99,)}.get(one.name, 77)
        found = list(config_causes(ours, replace(ours, text=replace(ours.text, **{one.name: other}))))
        assert len(found) == (one.name not in silent), one.name
        for cause in found:
            assert cause.evidence.startswith(f"{one.name} is ")
            assert cause.severity is (Severity.WARNING if one.name in warned else Severity.ERROR)
    for one in fields(VisionConfig):
        (cause,) = config_causes(ours, replace(ours, vision=replace(ours.vision, **{one.name: 77})))
        assert cause.evidence.startswith(f"vision_config.{one.name} is 77")
        assert cause.severity is Severity.ERROR


def test_a_report_names_what_did_not_come_along(converted: Converted) -> None:
    original, out = converted(INT8)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["image_token_id"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    beside = out.parent / "original"
    beside.mkdir()
    for path in original.iterdir():
        (beside / path.name).symlink_to(path)
    (beside / "chat_template.jinja").write_text("x", encoding="utf-8")
    found = compare(beside, out, ParityOptions(run_model=False))
    assert found.verdict is Verdict.FAIL
    assert [str(cause) for cause in found.causes] == [
        "config.json: image_token_id is missing, the original has 410",
        "chat_template.jinja: the chat template is missing: engines cannot frame a conversation",
    ]
