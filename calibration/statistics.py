"""The read side of statistics: what the inputs of every matrix were like, and how far that is to be trusted.

A folder of statistics holds ``statistics.json`` and one safetensors file a layer. Of each site (``sites.py``) there are
means and the largest of its inputs; of the layer, which experts were visited together.

Shapes: K inputs of a matrix, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from calibration.sites import DOWN, GATE_UP, site_of
from qconvert.core.coverage import layer_name
from qconvert.core.errors import SourceError, UsageError
from qconvert.core.role import Section, TensorRole
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import Checkpoint, byte_view
from qconvert.io.file_record import FileRecord, hash_span
from qconvert.io.fingerprint import fingerprint
from qconvert.io.hashing import XXH3, new_hash
from qconvert.io.shard_file import ShardFile, open_shard
from qconvert.io.source_folder import plain_name, read_whole
from qconvert.io.strict_json import parse_object

SCHEMA = "qconvert-statistics/1"
DOCUMENT = "statistics.json"

MEAN_ABS, MEAN_SQUARE, MAX_ABS, TOKENS = "mean_abs", "mean_square", "max_abs", "tokens"
POOLED = "pooled_mean_square"
CO_VISITS = "co_visits"

PRIOR_TOKENS = 32
"""What an expert's own inputs are averaged with counts as so many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVisits:
    """Tokens that each expert of a layer got, int64 [E], and the inputs K of its gate and up."""

    section: Section
    layer: int
    tokens: Tensor
    inputs: int


class Statistics:
    """Statistics of one checkpoint's inputs, checked as a whole before anything of them is believed.

    Attributes:
        path: the folder.
        hash: xxh3-128 of ``statistics.json``, which holds the hashes of all else.
        record: that document.
    """

    path: Path
    hash: str
    record: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        """Prefer ``Statistics.open``; whoever calls this closes it."""
        self.path = path
        self._shards: dict[str, ShardFile] = {}
        self._places: dict[str, TensorInfo] = {}
        if not (path / DOCUMENT).is_file():
            raise SourceError(f"{path}: no {DOCUMENT} in it; expected the output of `qconvert calibrate`")
        raw = read_whole(path / DOCUMENT)
        self.hash = xxhash.xxh3_128_hexdigest(raw)
        self.record = parse_object(raw, str(path / DOCUMENT))
        schema = self.record.get("schema")
        if schema != SCHEMA:
            raise SourceError(f"{path / DOCUMENT}: its schema is {schema!r}, expected {SCHEMA!r}: calibrate again")
        try:
            for name, record in self._files():
                self._open(name, record)
            self._check_sites()
            for name in self._places:
                self._check(name)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, checkpoint: Checkpoint | None = None) -> Statistics:
        """Open the folder ``path``, read all of it once and compare it with its hashes.

        Args:
            path: what ``qconvert calibrate`` made.
            checkpoint: the one that it has to be of.

        Raises:
            SourceError: no statistics, those of another schema, or damaged ones: cut off, changed, NaN.
            UsageError: statistics of another checkpoint.
        """
        found = cls(path)
        try:
            if checkpoint is not None:
                found.check_source(checkpoint)
        except BaseException:
            found.close()
            raise
        return found

    @property
    def entry(self) -> dict[str, Any]:
        """What manifests say of them: folder, hash, and the tokens that they were made of."""
        windows = self.record.get("windows")
        known = windows if isinstance(windows, dict) else {}
        return {
            "folder": self.path.name,
            "hash": self.hash,
            **{key: known[key] for key in ("tokens", "ids_sha256") if key in known},
        }

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Refuse to speak of another checkpoint than the one that was looked at.

        Raises:
            UsageError: it is another one.
        """
        expected, source = fingerprint(checkpoint), self.record.get("source")
        if source != expected:
            raise UsageError(
                f"{self.path} was made of another checkpoint: its fingerprint is {source}, that of {checkpoint.path} "
                f"is {expected}; run `qconvert calibrate {checkpoint.path}`"
            )

    def has(self, role: TensorRole) -> bool:
        """Whether the inputs of the matrix with ``role`` were looked at; no expert is named for a whole stack."""
        site = site_of(role)
        return site is not None and f"{site}.{TOKENS}" in self._places

    def tokens(self, role: TensorRole) -> int:
        """Tokens that a matrix has seen; 0 of an expert that none reached.

        Raises:
            KeyError: nothing was looked at for ``role``.
        """
        return int(self._row(role, TOKENS))

    def mean_squares(self, role: TensorRole) -> Tensor:
        """Mean of ``x**2`` of each input of a matrix, float32 [K]; zeros of an expert that no token reached.

        Raises:
            KeyError: nothing was looked at for ``role``.
        """
        return self._row(role, MEAN_SQUARE)

    def mean_abs(self, role: TensorRole) -> Tensor:
        """Mean of ``|x|``, as ``mean_squares``."""
        return self._row(role, MEAN_ABS)

    def max_abs(self, role: TensorRole) -> Tensor:
        """The largest ``|x|``, as ``mean_squares``."""
        return self._row(role, MAX_ABS)

    def importance(self, role: TensorRole) -> Tensor:
        """What ``mean_squares`` says if few tokens are not believed too much, float32 [K].

        ``(T m + P p) / (T + P)`` with T tokens of its own, P = ``PRIOR_TOKENS`` and as p, for gate and up of a routed
        expert, the mean over all tokens of its layer, for any other matrix its own mean over all inputs. Units of down
        mean something else in each expert, so that those of others say nothing: an expert without a token has ones.

        Raises:
            KeyError: nothing was looked at for ``role``.
        """
        own, tokens = self.mean_squares(role).to(torch.float64), self.tokens(role)
        pooled = f"{site_of(role)}.{POOLED}"
        if pooled in self._places:
            prior = self._read(pooled).to(torch.float64)
        else:
            prior = own.mean().expand_as(own) if tokens else torch.ones_like(own)
        return ((tokens * own + PRIOR_TOKENS * prior) / (tokens + PRIOR_TOKENS)).to(torch.float32)

    def co_visits(self, section: Section, layer: int) -> Tensor:
        """How many tokens went to both of two experts, to one of them on the diagonal: int64 [E, E].

        Raises:
            KeyError: no such layer.
        """
        return self._read(f"{layer_name(section, layer)}.{CO_VISITS}")

    def layers(self) -> Iterator[LayerVisits]:
        """What the experts of each layer got, the decoder's first, then the prediction head's."""
        for section in (Section.TEXT, Section.MTP):
            layer = 0
            while (site := f"{layer_name(section, layer)}.{GATE_UP}") + f".{TOKENS}" in self._places:
                inputs = self._places[f"{site}.{MEAN_SQUARE}"].shape[-1]
                yield LayerVisits(section=section, layer=layer, tokens=self._read(f"{site}.{TOKENS}"), inputs=inputs)
                layer += 1

    def close(self) -> None:
        """Close all files."""
        while self._shards:
            os.close(self._shards.popitem()[1].fd)

    def __enter__(self) -> Statistics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _files(self) -> Iterator[tuple[str, FileRecord]]:
        files = self.record.get("files")
        if not isinstance(files, dict) or not files:
            raise self._damaged("lists no files")
        for name, entry in files.items():
            if not plain_name(name) or not isinstance(entry, dict) or set(entry) != {"bytes", "hash"}:
                raise self._damaged(f"does not say what {name!r} is")
            yield name, FileRecord(nbytes=entry["bytes"], digest=entry["hash"])

    def _damaged(self, what: str) -> SourceError:
        return SourceError(f"{self.path / DOCUMENT}: {what}; it is damaged: calibrate again")

    def _open(self, name: str, record: FileRecord) -> None:
        shard = open_shard(self.path / name)
        self._shards[name] = shard
        digest = new_hash(XXH3)
        hash_span(shard.fd, 0, shard.nbytes, digest, self.path / name)
        if (shard.nbytes, digest.hexdigest()) != (record.nbytes, record.digest):
            raise SourceError(
                f"{self.path / name}: not what {DOCUMENT} lists ({shard.nbytes} bytes, expected {record.nbytes}): it "
                "was cut off or changed since: calibrate again"
            )
        self._places |= {info.name: info for info in shard.header.tensors}

    def _check_sites(self) -> None:
        """Every site has all its tensors, and their shapes belong together."""
        for name, info in self._places.items():
            site, _, what = name.rpartition(".")
            if what != TOKENS:
                continue
            shapes = {
                self._places[part].shape if part in self._places else None
                for part in (f"{site}.{what}" for what in (MEAN_ABS, MEAN_SQUARE, MAX_ABS))
            }
            shape = shapes.pop()
            expected = 2 if site.endswith((GATE_UP, DOWN)) else 1  # dimensions
            if shapes or shape is None or len(shape) != expected or info.shape != (*shape[:-1], *(1,) * (2 - expected)):
                raise SourceError(
                    f"{self.path / info.shard}: the tensors of {site} do not belong together: calibrate again"
                )

    def _check(self, name: str) -> None:
        values = self._read(name)
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise SourceError(
                f"{self.path / self._places[name].shard}: {name} has NaN, infinite or negative values: calibrate again"
            )

    def _row(self, role: TensorRole, what: str) -> Tensor:
        site = site_of(role)
        name = f"{site}.{what}"
        if name not in self._places:
            raise KeyError(f"{self.path} says nothing of the inputs of {role}")
        if site is None or not site.endswith((GATE_UP, DOWN)):
            return self._read(name)
        if role.expert is None or role.expert >= self._places[name].shape[0]:
            raise KeyError(f"{self.path} says nothing of the inputs of {role}")
        return self._read(name, role.expert)

    def _read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one entry along its first dimension."""
        info = self._places[name]
        shape, begin, end = info.shape, info.begin, info.end
        if row is not None:
            size = info.nbytes // shape[0]
            shape, begin, end = shape[1:], begin + row * size, begin + (row + 1) * size
        data = torch.empty(end - begin, dtype=torch.uint8)
        target, done = byte_view(data), 0
        while done < len(target):
            count = os.preadv(self._shards[info.shard].fd, [target[done:]], begin + done)
            if not count:
                raise SourceError(f"{self.path / info.shard}: the file shrank while it was read")
            done += count
        return data.view(info.dtype.torch_dtype).view(shape)
