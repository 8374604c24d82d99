"""The trainable layers on plain and quantized linears: start, dtype, gradients, what merging gives, dropout."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.memory.quantized import QuantizedLinear, quantize
from musubi_tuner.networks import base
from musubi_tuner.networks.base import Dropout, LayerSpec, base_weight, is_linear
from musubi_tuner.networks.lora import DoRALayer, LoRALayer
from musubi_tuner.networks.lycoris import LoKrLayer, small_factor
from musubi_tuner.networks.types import TYPES

KINDS = list(TYPES)
ADAPTERS = [kind for kind in KINDS if kind != "full"]
IN, OUT, RANK = 64, 48, 2


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)


def quantized(weight_format: str) -> QuantizedLinear:
    plain = linear()
    return QuantizedLinear(quantize(plain.weight, weight_format), plain.bias.detach(), IN)


FORMATS = ["fp8", "int8", "nf4"]


def make(kind: str, on: nn.Module | None = None, *, trained: bool = True, **spec: object) -> base.AdapterLayer:
    spec = {"rank": RANK, "alpha": 2.0 * RANK} | spec
    layer = TYPES[kind](on or linear(), LayerSpec(**spec), torch.Generator().manual_seed(1))
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in layer.parameters(recurse=False):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 5, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_equals_the_base(kind, bias):
    frozen, x = linear(bias), inputs()
    assert float((make(kind, frozen, trained=False)(x) - frozen(x)).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [linear(dtype=torch.bfloat16), *map(quantized, FORMATS)], ids=["bfloat16", *FORMATS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_returns_the_dtype_it_received_and_learns(kind, frozen, dtype):
    layer = make(kind, frozen, trained=False)
    for _ in range(2):  # zero factors give their partners a gradient from the second step on
        result = layer(inputs(dtype=dtype))
        assert result.dtype == dtype
        result.float().pow(2).sum().backward()
        with torch.no_grad():
            for parameter in layer.parameters(recurse=False):
                assert parameter.dtype == torch.float32
                parameter -= 1e-2 * parameter.grad
    assert all(bool(parameter.grad.any()) for parameter in layer.parameters(recurse=False))
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_helper_runs_every_base(kind, monkeypatch):
    calls = []
    run = base.run_base

    def counted(frozen, x):
        calls.append(frozen)
        return run(frozen, x)

    for module in (base, __import__("musubi_tuner.networks.types", fromlist=["full"])):
        monkeypatch.setattr(module, "run_base", counted)
    layer = make(kind)
    layer.enabled = False
    assert torch.equal(layer(inputs()), layer.base(inputs()))
    assert calls == [layer.base]


@pytest.mark.parametrize("frozen", [linear(), linear(bias=False), *map(quantized, FORMATS)], ids=["plain", "no bias", *FORMATS])
@pytest.mark.parametrize("spec", [{}, {"rank_stabilized": True}, {"rank": 12, "alpha": 5.0}], ids=["ratio", "stabilized", "rank 12"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_does_what_the_layer_does(kind, spec, frozen):
    layer = make(kind, frozen, **spec)
    x = inputs()
    merged = layer.merged(base_weight(frozen).float(), layer.file_tensors())
    rounding = 1e-4
    if isinstance(frozen, QuantizedLinear):  # low-bit products round their inputs; a DoRA scales what they give
        rounding += 2 * float((frozen(x) - F.linear(x, base_weight(frozen), frozen.bias)).abs().max())
    assert float((layer(x) - F.linear(x, merged, frozen.bias)).abs().max()) < rounding < 0.3
    assert float((layer(x) - frozen(x)).abs().max()) > 0.1, "the layer does something"


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_another_scale_takes_over_the_stored_tensors(kind):
    stored, x = make(kind), inputs()
    fresh = make(kind, alpha=0.5, trained=False)
    fresh.load(stored.file_tensors())
    assert float((fresh(x) - stored(x)).abs().max()) < 1e-5
    of_file = TYPES[kind](linear(), TYPES[kind].spec_of(stored.file_tensors()), torch.Generator())
    of_file.load(stored.file_tensors())
    assert float((of_file(x) - stored(x)).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_another_rank_is_named(kind):
    with pytest.raises(base.ShapeMismatch, match="rank|w2_a|network_dim"):
        make(kind, rank=1).load(make(kind).file_tensors())


def test_scales():
    assert make("lora", rank=4, alpha=8.0).scale == 2
    assert make("lora", rank=4, alpha=8.0, rank_stabilized=True).scale == 4
    layer = make("lora", rank=4, alpha=8.0)
    delta = layer.merged(torch.zeros(OUT, IN), layer.file_tensors())
    assert torch.allclose(delta, 2 * layer.lora_B @ layer.lora_A)


def test_dora_length_equals_the_formed_matrix_on_plain_and_quantized_linears():
    for frozen, tolerance in ((linear(), 1e-6), (linear(dtype=torch.bfloat16), 5e-3), (quantized("int8"), 1e-6), (quantized("nf4"), 1e-6)):
        layer = make("dora", frozen)
        formed = base_weight(frozen).float() + layer.scale * layer.lora_B @ layer.lora_A
        assert torch.allclose(layer._lengths(), formed.norm(dim=1), rtol=tolerance)
    for weight_format, tolerance in (("int8", 1e-2), ("fp8", 2e-2), ("nf4", 5e-2)):
        low, plain = make("dora", quantized(weight_format)), make("dora")
        assert torch.allclose(low._lengths(), plain._lengths(), rtol=tolerance), "within the error of its bits"


def test_dora_gradient_takes_the_length_as_a_constant():
    layer, x = make("dora"), inputs()
    layer(x).pow(2).sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    direction = layer.base.weight + layer.scale * b @ a
    F.linear(x, m[:, None] * direction / direction.detach().norm(dim=1, keepdim=True), layer.base.bias).pow(2).sum().backward()
    for ours, theirs in ((layer.lora_A, a), (layer.lora_B, b), (layer.magnitude, m)):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "factor", "expected"), [(4096, -1, 64), (4096, 16, 16), (36, 8, 6), (24, -1, 4), (17, 4, 1), (2048, 100, 32)]
)
def test_small_factors(size, factor, expected):
    assert small_factor(size, factor) == expected


def test_lokr_shapes():
    low, whole = make("lokr"), make("lokr", rank=4)
    assert {name: tuple(p.shape) for name, p in low.named_parameters(recurse=False)} == {
        "lokr_w1": (6, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}  # fmt: skip
    assert tuple(whole.lokr_w2.shape) == (8, 8), "a rank of half the size keeps w2 whole"
    assert tuple(make("lokr", rank=2, factor=2).lokr_w1.shape) == (2, 2)
    assert isinstance(whole, LoKrLayer) and whole.scale == 1


def network(kind: str, dropout: Dropout, width: int = 64):
    from musubi_tuner.networks.arguments import network_arguments
    from musubi_tuner.networks.network import LoRANetwork

    layers = {name: make(kind, nn.Linear(IN, OUT).requires_grad_(False), rank=width, dropout=dropout) for name in "ab"}
    return LoRANetwork(layers, network_arguments({}, dim=4, alpha=4), kind)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_masks_have_the_share_and_the_scale_of_their_probability(kind):
    adapted = network(kind, Dropout(rank=0.25, module=0.4, neuron=0.1))
    layer = adapted.layers["a"]
    inner, whole, neurons = [], [], []
    with adapted.dropout(range(400)):
        inner, neurons, whole = layer.masks.inner, layer.masks.inputs, layer.masks.module
    assert inner.shape == (400, 1, layer.dropout_width) and neurons.shape == (400, 1, IN) and whole.shape == (400, 1, 1)
    assert sorted(inner.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert sorted(neurons.unique().tolist()) == pytest.approx([0, 1 / 0.9])
    assert sorted(whole.unique().tolist()) == [0, 1], "a module that stays is not scaled"
    for mask, p in ((inner, 0.25), (neurons, 0.1), (whole, 0.4)):
        assert float((mask == 0).float().mean()) == pytest.approx(p, abs=0.08)
    assert float(inner.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_dropout_is_off_outside_its_context_and_follows_the_seed_of_the_item_alone(kind):
    adapted = network(kind, Dropout(rank=0.5, module=0.3, neuron=0.2))
    layer, x = adapted.layers["a"], inputs(3)
    plain = layer(x)
    with adapted.dropout([5, 6, 7]):
        together = layer(x)
        assert not torch.allclose(together, plain)
        assert torch.equal(together, layer(x)), "the same masks when a block is computed again"
    assert layer.masks is None and torch.equal(layer(x), plain)
    with adapted.dropout([6]):
        assert torch.allclose(layer(x[1:2]), together[1:2], atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_items_in_one_batch_learn_what_they_learn_one_by_one(kind):
    """Masks of a single item may lie on other factors than those of several."""
    adapted = network(kind, Dropout(rank=0.5, module=0.3, neuron=0.2))
    layer, x = adapted.layers["a"], inputs(3)

    def gradients(seeds: list[int], part: slice) -> list[torch.Tensor]:
        with adapted.dropout(seeds):
            (layer(x[part]) ** 2).sum().backward()
        found = [parameter.grad for parameter in layer.parameters(recurse=False)]
        for parameter in layer.parameters(recurse=False):
            parameter.grad = None
        return found

    together = gradients([5, 6, 7], slice(0, 3))
    apart = [sum(parts) for parts in zip(*(gradients([5 + i], slice(i, i + 1)) for i in range(3)), strict=True)]
    for ours, theirs in zip(together, apart, strict=True):
        assert float(theirs.abs().max()) > 0 and torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_rank_dropout_cuts_ranks_and_module_dropout_the_whole_adapter():
    adapted = network("lora", Dropout(rank=0.5, module=0.5), width=RANK)
    layer, x = adapted.layers["a"], inputs(8)
    with adapted.dropout(range(8)):
        result, inner, module = layer(x), layer.masks.inner, layer.masks.module
    expected = layer.base(x) + module * F.linear(F.linear(x, layer.lora_A) * inner, layer.lora_B * layer.scale)
    assert torch.allclose(result, expected, atol=1e-5)
    dropped = module[:, 0, 0] == 0
    assert bool(dropped.any()) and torch.equal(result[dropped], layer.base(x)[dropped])


def test_without_dropout_nothing_is_drawn():
    adapted = network("lora", Dropout())
    with adapted.dropout([1]):
        assert adapted.layers["a"].masks is None


def test_linears_are_told_by_their_class_and_not_by_their_tensors():
    assert is_linear(linear()) and is_linear(quantized("int8"))
    assert not is_linear(nn.Conv1d(2, 2, 1)) and not is_linear(make("lora"))
    assert not base_weight(linear()).requires_grad
    for path in (Path(__file__).parents[2] / "src").rglob("*.py"):
        assert not re.search(r"""hasattr\([^)]*["']dequantize""", path.read_text(encoding="utf-8")), path


def test_dora_is_a_lora_whose_partners_start_alike():
    assert isinstance(make("dora"), DoRALayer) and torch.equal(make("dora", trained=False).lora_A, make("lora", trained=False).lora_A)
    assert isinstance(make("dora"), LoRALayer)
