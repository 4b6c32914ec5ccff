"""Make the demo checkpoint: ``python -m calibration.demo`` repeats every step of it.

Corpus and tokenizer from the running Python, training on the reference model, measurements on the held-out text, and
the folder as a hub repository would have it.
"""

from __future__ import annotations

import argparse
import logging
import platform
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from calibration.corpus import DOMAINS, Corpus, CorpusError, collect
from calibration.demo_checkpoint import checkpoint_tensors, round_as_stored, save_checkpoint
from calibration.demo_config import CONFIG, CONTEXT, FILES, TOKEN_IDS, VOCAB_SIZE
from calibration.demo_report import measure, readme
from calibration.tokenizer import END_OF_TEXT, load_tokenizer, save_tokenizer, train_tokenizer, write_json
from calibration.windows import batches, cut, token_stream
from reference_model.config import ModelConfig
from reference_model.model import CausalLM
from reference_model.train import Recipe, start, train
from reference_model.vision import VisionTower, start_vision

CORPUS_SHA256 = "bea24981e2a2dc3f97c7e2ed5b35ffc14aebc3556c5d32958debc83607d3607e"
CORPUS_PYTHON = "3.11.7"
"""The corpus that the shipped weights were trained on, and the Python that has it."""

SEED = 0
WINDOW = 256
BATCH = 8
WORKERS = 2
RECIPE = Recipe(
    steps=860,
    decay=685,
    warmup=10,
    matrix_rate=0.04,
    embedding_rate=0.2,
    head_rate=0.008,
    other_rate=0.006,
    balance_weight=0.02,
)
SAVE_EVERY = 25

log = logging.getLogger("calibration.demo")


def prepare(corpus: Corpus, folder: Path) -> FastTokenizer:
    """Write what does not depend on training: tokenizer, configurations and the held-out text."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer((document.text for document in corpus.train), VOCAB_SIZE), folder, CONTEXT)
    for name, content in FILES.items():
        write_json(folder / name, content)
    held_out = folder / "heldout"
    held_out.mkdir(exist_ok=True)
    for domain in DOMAINS:
        (held_out / f"{domain}.txt").write_text(corpus.held_out_text(domain), encoding="utf-8")
    return load_tokenizer(folder)


class StateError(ValueError):
    """A saved training state belongs to another corpus or recipe."""


def fit(model: CausalLM, windows: Tensor, recipe: Recipe, state_file: Path, digest: str) -> float:
    """Train, or go on from ``state_file``; gives the seconds of all runs together.

    Raises:
        StateError: ``state_file`` was written for another corpus or other rates.
    """
    # The length of the run may change while the rates are flat.
    run = {**asdict(recipe), "steps": 0, "decay": 0, "corpus": digest, "seed": SEED, "batch": BATCH}
    saved = torch.load(state_file, weights_only=True) if state_file.is_file() else None
    if saved is not None and saved["run"] != run:
        raise StateError(f"{state_file} is the state of another training: {saved['run']} instead of {run}; remove it")
    first = 0 if saved is None else saved["step"] + 1
    before = 0.0 if saved is None else saved["seconds"]
    start(model, SEED)
    began = time.monotonic()
    state_file.parent.mkdir(parents=True, exist_ok=True)
    recent: list[float] = []
    order = batches(windows, BATCH, SEED, first)
    for report in train(model, order, recipe, workers=WORKERS, resume=saved):
        seconds = before + time.monotonic() - began
        recent = [*recent[-19:], report.next_token]
        if (report.step + 1) % 10 == 0:
            log.info(
                "step %d of %d: %.3f nats a token (mean of the last %d), %.3f drafted, balance %.3f, %.0f s",
                report.step + 1, recipe.steps, sum(recent) / len(recent), len(recent),
                report.draft, report.balance, seconds,
            )  # fmt: skip
        if (report.step + 1) % SAVE_EVERY == 0 or report.step + 1 == recipe.steps:
            unfinished = state_file.with_suffix(".unfinished")
            torch.save({**report.state(), "run": run, "seconds": seconds}, unfinished)
            unfinished.replace(state_file)
    return before + time.monotonic() - began


def check_corpus(digest: str, allow_other: bool) -> None:
    """Compare the corpus with the recorded one.

    Raises:
        CorpusError: it differs and that was not allowed.
    """
    if digest == CORPUS_SHA256:
        return
    message = (
        f"the standard library of Python {platform.python_version()} gives the corpus {digest[:16]}..., the shipped "
        f"weights were trained on {CORPUS_SHA256[:16]}... of Python {CORPUS_PYTHON}"
    )
    if not allow_other:
        raise CorpusError(f"{message}. Use that Python, or pass --allow-other-corpus to train other weights")
    log.warning("%s; training other weights", message)


def make(folder: Path, state_file: Path, recipe: Recipe, allow_other: bool) -> dict[str, Any]:
    """Everything, from corpus to README; gives the content of ``training.json``."""
    torch.set_num_threads(1)  # the workers are the parallelism
    corpus = collect()
    check_corpus(corpus.digest, allow_other)
    # Beside the folder until all of it is there: an interrupted run must not leave old weights with a new tokenizer.
    building = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(building, ignore_errors=True)
    tokenizer = prepare(corpus, building)
    stream = token_stream((tokenizer.encode(d.text).ids for d in corpus.train), TOKEN_IDS[END_OF_TEXT])
    windows = cut(stream, WINDOW)
    config = ModelConfig.from_dict(CONFIG)
    model = CausalLM(config.text)
    log.info(
        "%d training tokens in %d windows, %d weights",
        len(stream),
        len(windows),
        sum(p.numel() for p in model.parameters()),
    )
    seconds = fit(model, windows, recipe, state_file, corpus.digest)

    round_as_stored(model)
    if config.vision is None:
        raise ValueError("the demo configuration has no vision tower")
    vision = VisionTower(config.vision)
    start_vision(vision, SEED)
    total_bytes = save_checkpoint(checkpoint_tensors(model, vision), building)

    torch.set_num_threads(WORKERS)
    held_out: dict[str, Tensor] = {
        domain: torch.tensor(tokenizer.encode(corpus.held_out_text(domain)).ids) for domain in DOMAINS
    }
    record: dict[str, Any] = {
        "corpus": {
            "sha256": corpus.digest,
            "documents": len(corpus.train),
            "tokens": len(stream),
            "characters": sum(len(document.text) for document in corpus.train),
        },
        "seed": SEED,
        "recipe": {**asdict(recipe), "batch": BATCH, "window": WINDOW, "workers": WORKERS},
        "trained_tokens": recipe.steps * BATCH * WINDOW,
        "seconds": round(seconds),
        "tensor_bytes": total_bytes,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "measured": measure(model, stream, held_out),
    }
    write_json(building / "training.json", record)
    (building / "README.md").write_text(readme(record), encoding="utf-8")
    put_in_place(building, folder)
    state_file.unlink()  # or the next run would have nothing left to train
    return record


def put_in_place(building: Path, folder: Path) -> None:
    """Rename ``building`` to ``folder``; what stood there stands aside until then and is removed."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        building.rename(folder)
        shutil.rmtree(aside)
    else:
        building.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 when the corpus or a saved state is another one."""
    parser = argparse.ArgumentParser(prog="python -m calibration.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("reference_model/demo"), help="checkpoint folder")
    parser.add_argument(
        "--state", type=Path, default=Path("training/state.pt"), help="where training can be resumed from"
    )
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="batches to train")
    parser.add_argument("--decay", type=int, default=RECIPE.decay, help="last steps, over which the rates fall")
    parser.add_argument("--allow-other-corpus", action="store_true", help="train although this Python has other text")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    recipe = Recipe(**{**asdict(RECIPE), "steps": options.steps, "decay": options.decay})
    try:
        make(options.output, options.state, recipe, options.allow_other_corpus)
    except (CorpusError, StateError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
