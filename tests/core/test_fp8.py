"""Our way from e4m3 to float32 is torch's, for every code."""

from __future__ import annotations

import torch

from qconvert.core.fp8 import widen_e4m3


def test_every_code_is_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    ours, torchs = widen_e4m3(codes), codes.to(torch.float32)
    assert torch.equal(ours.isnan(), torchs.isnan()) and int(ours.isnan().sum()) == 2
    numbers = ~torchs.isnan()
    assert torch.equal(ours[numbers].view(torch.int32), torchs[numbers].view(torch.int32))  # Signed zeros too.


def test_strides_do_not_matter() -> None:
    codes = torch.randn(6, 10).to(torch.float8_e4m3fn)
    assert torch.equal(widen_e4m3(codes.T), codes.T.to(torch.float32))
    assert torch.equal(widen_e4m3(codes[:, ::2]), codes[:, ::2].to(torch.float32))
