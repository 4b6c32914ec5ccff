"""Write the token windows of a comparison, for peers to read.

    python benchmarks/quality/windows.py CHECKPOINT WORK CALIBRATION_TOKENS HELD_OUT_TOKENS

WORK gets ``calibration.npy``, the windows that qconvert's calibrated methods take by default, int64 [W, T], and
``held-out.npz``, those that are scored: ``ids`` one after another, and ``lengths``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from calibration.data import calibration_windows
from qconvert.cli.calibrate import WINDOW
from qconvert.parity.windows import choose_windows
from qconvert.weights.source import CheckpointWeights


def main() -> None:
    """Write both files."""
    checkpoint, work = Path(sys.argv[1]), Path(sys.argv[2])
    tokens, scored = int(sys.argv[3]), int(sys.argv[4])
    with CheckpointWeights.open(checkpoint) as source:
        vocabulary = source.config.text.vocab_size
    seen = calibration_windows(checkpoint, vocabulary, texts=(), tokens=tokens, window=WINDOW, seed=0)
    np.save(work / "calibration.npy", torch.cat(seen.batches).numpy())
    unseen = choose_windows(checkpoint, vocabulary, texts=(), tokens=scored, length=WINDOW, seed=0)
    rows = [row.numpy() for batch in unseen.batches for row in batch]
    np.savez(work / "held-out.npz", ids=np.concatenate(rows), lengths=[len(row) for row in rows])


if __name__ == "__main__":
    main()
