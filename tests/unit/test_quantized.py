"""Frozen linears in few bits against the same arithmetic in float32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musubi_tuner.memory import compiling, quantized
from musubi_tuner.memory.quantized import QuantizedLinear, dequantize, quantize, relative_error

FORMATS = {"fp8": 0.04, "int8": 0.02, "nf4": 0.12}
"""Largest relative error of a normal weight."""


def weight(rows: int = 96, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * columns**-0.5


@pytest.mark.parametrize("weight_format", FORMATS)
def test_codes_are_near_the_weight(weight_format):
    codes = quantize(weight(), weight_format)
    assert 0 < relative_error(weight(), codes) < FORMATS[weight_format]
    assert dequantize(codes).shape == (96, 128)
    heavy = weight() * torch.logspace(-3, 3, 96)[:, None]
    assert relative_error(heavy, quantize(heavy, weight_format)) < FORMATS[weight_format], "a scale for each row"
    assert relative_error(torch.zeros(32, 64), quantize(torch.zeros(32, 64), weight_format)) == 0


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 40])
def test_forward_and_input_gradient_follow_the_dequantized_weight(weight_format, dtype, tokens):
    """What is left is the rounding of activations and gradients: none in nf4, 2 to 4 % in fp8, 1 % in int8."""
    codes, bias = quantize(weight(), weight_format), torch.randn(96)
    layer = QuantizedLinear(codes, bias.to(dtype), 128)
    x = torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    seed = torch.randn(2, tokens, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = layer(x)
    y.backward(seed)
    exact = dequantize(codes)
    wanted, wanted_gradient = x.detach().float() @ exact.T + bias, seed.float() @ exact
    assert y.dtype == dtype and x.grad.dtype == dtype and torch.equal(layer.dequantized_weight(), exact)
    tolerance = {"fp8": 0.05, "int8": 0.02, "nf4": 0.01 if dtype == torch.bfloat16 else 1e-5}[weight_format]
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < tolerance
    assert float((x.grad.float() - wanted_gradient).norm() / wanted_gradient.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_without_the_fp8_product_gives_the_same_but_for_rounding(dtype, monkeypatch):
    """torch 2.11 has none there, and fails an assertion of its own."""
    layer = QuantizedLinear(quantize(weight(), "fp8"), torch.randn(96), 128)
    results = []
    for there in (quantized._FP8_ON_CPU, False):
        monkeypatch.setattr(quantized, "_FP8_ON_CPU", there)
        x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(3)).to(dtype))
        results.append((y.detach().float(), x.grad.float()))
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 4e-3, "one rounding to bf16"


@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_dequantized_weight_is_kept_for_the_backward_pass(weight_format):
    layer = QuantizedLinear(quantize(weight(), weight_format), None, 128)
    kept = []
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in kept} <= {layer.codes.data_ptr(), layer.scale.data_ptr()}


def test_operations_keep_their_contract():
    for weight_format in ("int8", "nf4"):
        layer = QuantizedLinear(quantize(weight(), weight_format), None, 128)
        x = torch.randn(40, 128, requires_grad=True)
        operation = getattr(torch.ops.ltxv2, f"{weight_format}_linear").default
        torch.library.opcheck(operation, (x, layer.codes, layer.scale, None), test_utils="test_faketensor")


@pytest.mark.usefixtures("cpp_compiler")
@pytest.mark.parametrize("weight_format", FORMATS)
def test_fused_kernels_equal_the_plain_operations_also_within_a_compiled_graph(weight_format, monkeypatch):
    """What runs on a GPU, compiled for the CPU: chains of small operations as one kernel, called by an operation within another graph."""
    layer = QuantizedLinear(quantize(weight(), weight_format), torch.randn(96), 128)
    x = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    seed = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)

    def run(function) -> tuple[torch.Tensor, torch.Tensor]:
        given = x.clone().requires_grad_()
        y = function(given)
        y.backward(seed)
        return y.detach(), given.grad

    plain = run(layer)
    calls = []
    monkeypatch.setattr(compiling, "compiles_for", lambda tensor: not calls.append(tensor.shape))
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        for ours, theirs in zip(run(function), plain, strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), atol=2e-2, rtol=2e-2)  # a code may round the other way
            assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 5e-3
    assert calls


@pytest.mark.parametrize("weight_format", FORMATS)
def test_no_rows_give_no_rows(weight_format):
    x = torch.zeros(0, 128, requires_grad=True)
    y = quantized.low_bit_linear(x, quantize(weight(), weight_format))
    y.sum().backward()
    assert y.shape == (0, 96) and x.grad.shape == (0, 128)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_cpu_without_the_product_is_found_out(error, monkeypatch):
    def refuse(*given, **named):
        raise error("not implemented")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert not quantized._cpu_multiplies_fp8()


class LargestFloat(TorchDispatchMode):
    """Bytes of the largest tensor in float32 or int32 that operations give."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32:
                self.bytes = max(self.bytes, one.nbytes)
        return result


def test_where_nothing_is_fused_rows_are_taken_some_at_a_time(monkeypatch):
    """With the same bits; in float32 nothing is held that is as large as the clip."""
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    factors, product = torch.rand(128) + 0.5, torch.randint(-(2**20), 2**20, (500, 128), dtype=torch.int32)
    scales = torch.rand(500, 1), torch.rand(128)

    def everything():
        found = [quantized._quantize_rows(x, given, dtype) for given in (None, factors) for dtype in (quantized.FP8, torch.int8)]
        flat = [one.view(torch.uint8) if one.dtype == quantized.FP8 else one for pair in found for one in pair]
        return [
            *flat,
            quantized._scaled(product, *scales, None, torch.bfloat16),
            quantized._scaled(product, *scales, factors, torch.bfloat16),
        ]

    with LargestFloat() as whole:
        wanted = everything()
    assert whole.bytes == 500 * 128 * 4
    monkeypatch.setattr(quantized, "_ENTRIES_OF_A_PART", 64 * 128)
    with LargestFloat() as parts:
        found = everything()
    assert parts.bytes == 64 * 128 * 4
    assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(found, wanted, strict=True))
