"""Where matrices are rounded, and whether it is there."""

from __future__ import annotations

import re

import torch

from qconvert.core.errors import UsageError


def device_named(name: str) -> torch.device:
    """The device that a user asks for: ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        UsageError: another name, or a device that is not there.
    """
    if re.fullmatch(r"cpu|cuda(:\d{1,2})?", name, re.ASCII) is None:
        raise UsageError(f"device {name!r} is unknown; expected cpu, cuda or, to choose one of several, cuda:1")
    device = torch.device(name)
    check_device(device)
    return device


def check_device(device: torch.device) -> None:
    """Refuse a device that is not there, before any work is done for it.

    Raises:
        UsageError: says what is missing and what to do.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise UsageError(f"device {device} cannot round; expected cpu or cuda")
    if not torch.cuda.is_available():
        cause = (
            f"torch {torch.__version__} is built without CUDA: install a CUDA build of it"
            if torch.version.cuda is None
            else f"torch {torch.__version__} finds no GPU: check the driver with nvidia-smi"
        )
        raise UsageError(f"device {device} is not there, {cause}, or round on the CPU with --device cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UsageError(f"device {device} is not there: the last of {count} is cuda:{count - 1}")
