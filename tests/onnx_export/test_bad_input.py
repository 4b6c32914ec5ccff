"""What a package or its user can get wrong is one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qconvert.cli.app import app
from qconvert.cli.demo import CHECKPOINT
from qconvert.core.errors import DataError, FormatError, PlanError, UsageError
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.generate import generate
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.runtime import Package
from qconvert.plan.policy import Policy, Rule, default_policy
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, error, exported

KEPT = Rule(match="*", scheme=None, reason="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages")
    make_tiny(out / "source", layers=2)
    export_onnx(out / "source", out / "package", EXACT)
    return out


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return Package(folder / "package", threads=1)


def two(*, up: Scheme | None, down: Scheme | None) -> Policy:
    schemes = {"gate": up, "up": up, "down": down}
    return Policy(rules=(*(Rule(match=f"text.expert.{k}", scheme=s, reason="test") for k, s in schemes.items()), KEPT))


@pytest.mark.parametrize(
    ("up", "down"), [(int4(32), INT8), (int4(32), int4(64)), (None, INT8), (int4(32), None)], ids=str
)
def test_stacks_that_one_operator_reads_differently_are_refused(
    folder: Path, tmp_path: Path, up: Scheme | None, down: Scheme | None
) -> None:
    options = replace(EXACT, policy=two(up=up, down=down))
    with pytest.raises(PlanError, match=r"gate_up_proj.*down_proj.*--ops standard"):
        export_onnx(folder / "source", tmp_path / "out", options)
    other = exported(folder / "source", tmp_path / "out", replace(options, ops="standard"))
    assert np.isfinite(other.forward(np.array([[1, 2, 3]])).logits).all()


def test_rules_that_decide_the_same_are_one(folder: Path, tmp_path: Path) -> None:
    exported(folder / "source", tmp_path / "out", replace(EXACT, policy=two(up=int4(32), down=int4(32))))


def test_a_matrix_that_blocks_do_not_divide_is_named(folder: Path, tmp_path: Path) -> None:
    policy = default_policy(int4(128), search=False, rules=())
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.experts\.\w+ cannot be stored as int4-g128"):
        export_onnx(folder / "source", tmp_path / "out", replace(EXACT, policy=policy))


@pytest.mark.parametrize("policy", [None, default_policy(int4(32), search=False, rules=())], ids=["plain", "int4"])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_infinite_weights_are_named_by_their_own_tensor(tmp_path: Path, part: str, policy: Policy | None) -> None:
    make_tiny(tmp_path / "source", layers=2, layout="per-expert", shards=1)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.language_model.layers.1.mlp.experts.3.{part}_proj.weight"][2, 3] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"experts\.3\.{part}_proj"):
        export_onnx(tmp_path / "source", tmp_path / "out", replace(EXACT, policy=policy))


@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        (np.array([[1, -1]]), {}, "-1"),
        (np.array([[1, 416]]), {}, "416"),
        (np.array([1, 2]), {}, r"expected int64 \[B, S\]"),
        (np.zeros((1, 0), np.int64), {}, "one token or more"),
        (np.array([[1]], np.int32), {}, "int32"),
        (np.array([[1, 2]]), {"attention_mask": np.ones((1, 3), np.int64)}, "attention_mask"),
        (np.array([[1, 2]]), {"position_ids": np.zeros((1, 2), np.int64)}, "position_ids"),
    ],
)
def test_calls_that_do_not_fit_are_refused(package: Package, ids, more, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        package.forward(ids, **more)


def test_a_cache_of_another_batch_or_of_the_draft_is_refused(package: Package) -> None:
    two_rows = package.forward(np.array([[1, 2], [3, 4]]))
    with pytest.raises(UsageError, match="another batch"):
        package.forward(np.array([[1]]), cache=two_rows.cache)
    told = package.draft(two_rows.hidden, np.array([[1, 2], [3, 4]]))
    with pytest.raises(UsageError, match="another batch or graph"):
        package.forward(np.array([[1], [2]]), cache=told.cache)


def test_any_number_but_zero_in_a_mask_is_a_real_token(package: Package) -> None:
    ids, mask = np.array([[1, 2, 3, 4]]), np.array([[0, 1, 1, 1]])
    assert error(
        package.forward(ids, attention_mask=2 * mask).logits[:, 1:],
        package.forward(ids, attention_mask=mask).logits[:, 1:],
    ) == pytest.approx(0.0, abs=1e-9)


def test_a_text_ends_where_the_generation_config_says(tmp_path: Path) -> None:
    export_onnx(CHECKPOINT, tmp_path / "package", EXACT)
    free = generate(Package(tmp_path / "package"), [5, 6, 7], max_tokens=6).tokens
    path = tmp_path / "package" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [free[2], 2040]}))
    assert generate(Package(tmp_path / "package"), [5, 6, 7], max_tokens=6).tokens == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("command", [("run", "text"), ("inspect",)])
@pytest.mark.parametrize("content", [b"", b"no model at all", None])
def test_a_damaged_graph_is_one_error(folder: Path, tmp_path: Path, command: tuple[str, ...], content: bytes) -> None:
    make_tiny(tmp_path / "source", layers=2)
    export_onnx(tmp_path / "source", tmp_path / "package", EXACT)
    model = tmp_path / "package" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-999] if content is None else content)
    done = CliRunner().invoke(app, [command[0], str(tmp_path / "package"), *command[1:]])
    assert done.exit_code == 3, done.output
    assert "model.onnx" in done.output


def test_a_tokenizer_that_is_none_is_named(folder: Path) -> None:
    (folder / "package" / "tokenizer.json").write_text("{}")
    done = CliRunner().invoke(app, ["run", str(folder / "package"), "text"])
    assert done.exit_code == 3
    assert "tokenizer.json is no tokenizer" in done.output


@pytest.mark.parametrize("wrong", [{"ops": "fast"}, {"accuracy_level": 3}, {"shard_bytes": 0}])
def test_options_that_there_are_not_are_refused_when_they_are_made(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        PackageOptions(**wrong)
    with pytest.raises(UsageError):
        PackageOptions.of_entry({**PackageOptions().entry, **wrong}, None)


def test_a_run_has_numba_before_its_threads_do(tmp_path: Path) -> None:
    """Two threads that import parts of it at the same time break it."""
    make_tiny(tmp_path / "source", layers=2)
    script = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "import qconvert.run as run\n"
        "before = threading.Thread.start\n"
        "def start(self):\n"
        "    assert not self.name.startswith('step') or 'numba' in sys.modules\n"
        "    before(self)\n"
        "threading.Thread.start = start\n"
        "from qconvert.convert import convert\n"
        "from qconvert.core.scheme import INT8\n"
        "from qconvert.plan.policy import default_policy\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), default_policy(INT8, search=False, rules=()))\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "source", tmp_path / "out"], check=True)


def test_a_rule_that_rounds_a_table_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    rules = (Rule(match="text.embedding", scheme=INT8, reason="test"),)
    options = PackageOptions(policy=default_policy(int4(32), search=False, rules=rules))
    with pytest.raises(PlanError, match=r"rule 'text.embedding' rounds model.embed_tokens.weight.*looked up"):
        export_onnx(tmp_path / "source", tmp_path / "package", options)
