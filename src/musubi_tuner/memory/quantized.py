"""Frozen linears in few bits: fp8 and int8 that multiply in their own format, forward and backward from the same codes, and nf4.

Each has a gradient for its input alone, so nothing of a dequantized weight is ever kept for the backward pass, and the recompute levels see
it as one linear. fp8 is plain code for the compiler: in a compiled block the rows of an input are brought into few bits by the kernel that
makes them, once for all linears that read them. int8 and nf4 are custom operations, which a graph calls as they are: the product of int8
has 32 bits, and what is kept of it should be the 16 that it is brought to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import register_linear
from musubi_tuner.memory.compiling import compiles_for, fused
from musubi_tuner.memory.regions import Region, aligned

FP8 = torch.float8_e4m3fn
NF4_BLOCK = 64
_TINY = 1e-12
_ENTRIES_AT_ONCE = 2**21
"""Of a weight in nf4, where nothing can be fused."""
_ENTRIES_OF_A_PART = 2**23
"""The same of activations: two or three launches more for each of the clip's usual tensors, and 32 MiB for each step in float32."""
_SMALLEST_INT8_ROWS = 32
"""`torch._int_mm` on CUDA wants more than 16 rows."""

# Quantiles of a normal distribution, scaled to -1..1 (QLoRA, Dettmers et al. 2023, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight in few bits."""

    format: str
    values: Tensor
    """(out, in) fp8 or int8; (out, in / 2) uint8 for nf4, the even column in the high half."""
    scale: Tensor
    """(out,) float32; (out, in / 64) float16 for nf4."""


def quantize(weight: Tensor, weight_format: str) -> Codes:
    """Codes of an (out, in) weight: one scale for each output row, in nf4 for each 64 inputs of a row."""
    weight = weight.float()
    if weight_format == "nf4":
        return _quantize_nf4(weight)
    values, scale = _quantize_rows(weight, None, FP8 if weight_format == "fp8" else torch.int8)
    return Codes(weight_format, values, scale[:, 0])


def dequantize(codes: Codes) -> Tensor:
    """(out, in) float32."""
    if codes.format == "nf4":
        return _nf4_weight(codes.values, codes.scale, torch.float32)
    return codes.values.float() * codes.scale[:, None]


def relative_error(weight: Tensor, codes: Codes) -> float:
    """|W - dequantized| / |W| in the Frobenius norm."""
    weight = weight.float()
    return float((weight - dequantize(codes)).norm() / weight.norm().clamp(min=_TINY))


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in codes; frozen. Returns the dtype of `x`."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.format = codes.format
        self.in_features = in_features
        self.out_features = codes.values.shape[0]
        self.register_buffer("codes", codes.values)
        self.register_buffer("scale", codes.scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return low_bit_linear(x, Codes(self.format, self.codes, self.scale), self.bias)

    def dequantized_weight(self) -> Tensor:
        """(out, in) float32, outside autograd."""
        return dequantize(Codes(self.format, self.codes, self.scale))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class LowBitPlacer:
    """Puts each tensor of a checkpoint where it belongs while it is loaded: in codes or in the compute dtype, on the device or the host.

    One weight at a time is quantized, on the device, so the model in full precision is nowhere held.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        weight_format: str | None,
        low_bit: Callable[[str], bool],
        region_of: Callable[[str], Region | None] = lambda name: None,
    ) -> None:
        """
        Args:
            weight_format: None keeps all weights in `dtype`.
            low_bit, region_of: by the name of a tensor: is it to be in codes, and where on the host it stays; None = on the device.
        """
        self._device, self._dtype, self._format = device, dtype, weight_format
        self._low_bit, self._region_of = low_bit, region_of
        self._codes: dict[str, Codes] = {}
        self.errors: dict[str, float] = {}
        """Relative error of each quantized weight."""

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self._format is None or not self._low_bit(name):
            return self._placed(name, tensor, self._dtype if tensor.is_floating_point() else tensor.dtype)
        weight = tensor.to(self._device).float()
        codes = quantize(weight, self._format)
        self.errors[name] = relative_error(weight, codes)
        self._codes[name] = Codes(
            codes.format,
            self._placed(name, codes.values, codes.values.dtype),
            self._placed(name, codes.scale, codes.scale.dtype),
        )
        return torch.empty(0, dtype=self._dtype)

    def bytes_of(self, name: str, shape: torch.Size) -> int:
        """What a weight takes in a region once it is placed."""
        weight = torch.empty(shape, dtype=self._dtype, device="meta")
        if self._format is None or not self._low_bit(name):
            return aligned(weight.nbytes)
        codes = quantize(weight, self._format)
        return aligned(codes.values.nbytes) + aligned(codes.scale.nbytes)

    def _placed(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        region = self._region_of(name)
        return tensor.to(device=self._device, dtype=dtype) if region is None else region.put(tensor.to(dtype))

    def swap_linears(self, model: nn.Module) -> None:
        """Replace the linears whose weights are in codes; call it once the model is filled."""
        for name, codes in self._codes.items():
            path = name.removesuffix(".weight")
            owner_path, _, leaf = path.rpartition(".")
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear), path
            bias = None if linear.bias is None else linear.bias.detach()
            model.get_submodule(owner_path).add_module(leaf, QuantizedLinear(codes, bias, linear.in_features))
        self._codes.clear()


def _quantize_nf4(weight: Tensor) -> Codes:
    rows, columns = weight.shape
    assert columns % NF4_BLOCK == 0, f"nf4 needs a multiple of {NF4_BLOCK} inputs, not {columns}"
    blocks = weight.view(rows, columns // NF4_BLOCK, NF4_BLOCK)
    scale = blocks.abs().amax(dim=2).to(torch.float16).clamp(min=torch.finfo(torch.float16).tiny)
    table = torch.tensor(_NF4, device=weight.device)
    borders = (table[1:] + table[:-1]) / 2
    indices = torch.bucketize(blocks / scale[..., None].float(), borders, out_int32=True).to(torch.uint8).view(rows, columns)
    return Codes("nf4", (indices[:, 0::2] << 4) | indices[:, 1::2], scale)


def _nf4_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in); where nothing can be fused, some rows at a time, as the steps between would take many times the weight's own room."""
    if compiles_for(codes):
        return _nf4_rows(codes, scale, dtype)
    weight = torch.empty(codes.shape[0], 2 * codes.shape[1], device=codes.device, dtype=dtype)
    rows = max(1, _ENTRIES_AT_ONCE // codes.shape[1])
    for start in range(0, codes.shape[0], rows):
        weight[start : start + rows] = _nf4_rows(codes[start : start + rows], scale[start : start + rows], dtype)
    return weight


@fused
def _nf4_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    table = torch.tensor(_NF4, device=codes.device, dtype=torch.float32)
    pairs = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
    values = table[pairs.int()].view(*scale.shape, NF4_BLOCK) * scale[..., None].float()
    return values.view(codes.shape[0], -1).to(dtype)


def _parts(tensor: Tensor) -> list[slice]:
    """Rows that are taken together where nothing can be fused, as the steps between would take many times the tensor's own room."""
    rows, columns = tensor.shape
    if torch.compiler.is_compiling() or compiles_for(tensor):
        return [slice(rows)]
    many = max(1, _ENTRIES_OF_A_PART // max(1, columns))
    return [slice(start, start + many) for start in range(0, rows, many)]


def _quantize_rows(x: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of `x` (M, K), times (K,) `factors` where there are any, scaled into the range of `dtype`, and their scales (M, 1)."""
    parts = _parts(x)
    if len(parts) == 1:
        return _quantize_part(x, factors, dtype)
    values, scale = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    for part in parts:
        values[part], scale[part] = _quantize_part(x[part], factors, dtype)
    return values, scale


@fused
def _quantize_part(x: Tensor, factors: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x.float() if factors is None else x.float() * factors
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / _LARGEST[dtype]
    rows = x / scale
    return (rows if dtype == FP8 else rows.round()).to(dtype), scale


def _scaled(product: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An int32 product (M, N) in the numbers that it stands for."""
    parts = _parts(product)
    if len(parts) == 1:
        return _scaled_part(product, row_scale, scale, bias, dtype)
    out = torch.empty_like(product, dtype=dtype, memory_format=torch.contiguous_format)
    for part in parts:
        out[part] = _scaled_part(product[part], row_scale[part], scale, bias, dtype)
    return out


@fused
def _scaled_part(product: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = product.float() * row_scale * scale
    return (out if bias is None else out + bias.float()).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    """x W^T + b with W in fp8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        rows, row_scale = _quantize_rows(x.reshape(-1, x.shape[-1]), None, FP8)
        return _fp8_product(rows, row_scale, codes.t(), scale, bias, x.dtype).view(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """dx = (dy * scale) codes: the output scales are folded into dy, so that the same codes serve both directions."""
        (gradient,), (codes, scale) = gradients, ctx.saved_tensors
        rows, row_scale = _quantize_rows(gradient.reshape(-1, gradient.shape[-1]), scale, FP8)
        ones = torch.ones(codes.shape[1], device=codes.device)
        flat = _fp8_product(rows, row_scale, _turned(codes), ones, None, gradient.dtype)
        return flat.view(*gradient.shape[:-1], codes.shape[1]), None, None, None


def _cpu_multiplies_fp8() -> bool:
    """Whether torch has this product on a CPU, with a scale for each row and column: 2.11 has not. It is no faster there."""
    codes, scale = torch.zeros(16, 16, dtype=FP8), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, ValueError):  # which of them differs from torch to torch
        return False
    return True


_FP8_ON_CPU = _cpu_multiplies_fp8()
"""Tried when this is imported: within a block, the trial would be recorded as a part of it."""


def _fp8_product(rows: Tensor, row_scale: Tensor, right: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """fp8 rows (M, K) times right (K, N), column-major fp8 with (N,) scales."""
    if rows.device.type == "cpu" and not _FP8_ON_CPU:
        product = (rows.float() @ right.float()) * row_scale * scale
        return (product if bias is None else product + bias.float()).bfloat16().to(dtype)
    inside = None if bias is None else bias.bfloat16()
    return torch._scaled_mm(rows, right, scale_a=row_scale, scale_b=scale[None], bias=inside, out_dtype=torch.bfloat16).to(dtype)


@fused
def _turned(codes: Tensor) -> Tensor:
    """(N, K) codes, contiguous along N: both operands of a low-bit product must be contiguous along the axis that is summed."""
    return codes.t().contiguous().t()


def _multiply_int8(rows: Tensor, row_scale: Tensor, right: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int8 rows (M, K) times right (K, N) int8 with (N,) scales."""
    missing = max(0, _SMALLEST_INT8_ROWS - rows.shape[0])
    product = torch._int_mm(F.pad(rows, (0, 0, 0, missing)) if missing else rows, right)[: rows.shape[0]]
    return _scaled(product, row_scale, scale, bias, dtype)


_LARGEST = {FP8: 448.0, torch.int8: 127.0}


def _int8_forward(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows, row_scale = _quantize_rows(x, None, torch.int8)
    return _multiply_int8(rows, row_scale, codes.t(), scale, bias, x.dtype)


def _int8_backward(gradient: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """As in fp8."""
    rows, row_scale = _quantize_rows(gradient.reshape(-1, gradient.shape[-1]), scale, torch.int8)
    ones = torch.ones(codes.shape[1], device=codes.device)
    flat = _multiply_int8(rows, row_scale, _turned(codes), ones, None, gradient.dtype)
    return flat.view(*gradient.shape[:-1], codes.shape[1])


def _define(name: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor], inputs_of: Callable[[Tensor], int]) -> Any:
    """A custom operation `ltxv2::NAME(x, codes, scale, bias)` with a gradient for x."""

    def run(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return forward(flat, codes, scale, bias).view(*x.shape[:-1], codes.shape[0])

    def run_backward(gradient: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return backward(gradient, codes, scale)

    operation = torch.library.custom_op(f"ltxv2::{name}", run, mutates_args=())
    reverse = torch.library.custom_op(f"ltxv2::{name}_input_gradient", run_backward, mutates_args=())
    operation.register_fake(lambda x, codes, scale, bias: x.new_empty(*x.shape[:-1], codes.shape[0]))
    reverse.register_fake(lambda gradient, codes, scale: gradient.new_empty(*gradient.shape[:-1], inputs_of(codes)))

    def keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    def differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return reverse(gradient, *ctx.saved_tensors), None, None, None

    operation.register_autograd(differentiate, setup_context=keep)
    register_linear(getattr(torch.ops.ltxv2, name).default, lambda arguments: (inputs_of(arguments[1]), arguments[1].shape[0]))
    return operation


def _nf4_forward(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _nf4_weight(codes, scale, x.dtype), None if bias is None else bias.to(x.dtype))


def _nf4_backward(gradient: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return gradient @ _nf4_weight(codes, scale, gradient.dtype)


register_linear(torch.ops.aten._scaled_mm.default, lambda arguments: tuple(arguments[1].shape))
_OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "fp8": _Fp8Linear.apply,
    "int8": _define("int8_linear", _int8_forward, _int8_backward, lambda codes: codes.shape[1]),
    "nf4": _define("nf4_linear", _nf4_forward, _nf4_backward, lambda codes: 2 * codes.shape[1]),
}


def low_bit_linear(x: Tensor, codes: Codes, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of `x`, with everything that belongs to it: the rows of `x` are brought into few bits too."""
    return _OPERATIONS[codes.format](x, codes.values, codes.scale, bias)
