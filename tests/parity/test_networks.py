"""Network types against lycoris-lora and peft on plain linears, and DoRA files in diffusers' own loader. float32, CPU."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from musubi_tuner.networks.base import LayerSpec
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.networks.reading import read_network
from musubi_tuner.networks.types import TYPES
from tests.parity import models

RANK, ALPHA = 4, 6.0
KOHYA = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def linear(inputs: int, outputs: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Linear(inputs, outputs).requires_grad_(False)


def trained(kind: str, frozen: nn.Linear, rank: int = RANK):
    layer = TYPES[kind](frozen, LayerSpec(rank=rank, alpha=ALPHA), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return layer


@pytest.mark.parametrize("rank", [RANK, 40])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_forward_and_gradient_equal_lycoris(kind, rank):
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    frozen, reference = linear(64, 96), linear(64, 96)
    layer = trained(kind, frozen, rank)
    module_class = {"lora": LoConModule, "dora": LoConModule, "lokr": LokrModule, "loha": LohaModule}[kind]
    theirs = module_class("reference", reference, 1.0, rank, ALPHA, weight_decompose=kind == "dora", wd_on_out=True)
    theirs.apply_to()
    state = theirs.state_dict()
    own = {name: parameter.detach() for name, parameter in layer.named_parameters(recurse=False)}
    renamed = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "magnitude": "dora_scale"}
    values = {renamed.get(name, name): value for name, value in own.items()}
    if kind == "dora":
        values["dora_scale"] = values["dora_scale"][:, None]
    assert values.keys() == state.keys() - {"alpha"}, "the same decomposition is chosen"
    theirs.load_state_dict(state | values)

    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, expected = layer(ours_x), reference(their_x)
    assert float((expected - frozen(x)).abs().max()) > 0.1
    assert float((ours - expected).abs().max()) < 1e-4
    if kind != "dora":  # LyCORIS lets the length take part in the gradient; peft and section 4.3 of the paper do not
        ours.pow(2).mean().backward()
        expected.pow(2).mean().backward()
        assert float((ours_x.grad - their_x.grad).abs().max()) < 1e-5
        gradients = dict(theirs.named_parameters())
        for name, parameter in layer.named_parameters(recurse=False):
            assert torch.allclose(parameter.grad, gradients[renamed.get(name, name)].grad, rtol=1e-3, atol=1e-6), name


def test_dora_equals_peft():
    from peft import LoraConfig, inject_adapter_in_model

    frozen = linear(64, 96)
    layer = trained("dora", frozen)
    reference = nn.Sequential(linear(64, 96))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True), reference)
    parameters = dict(reference.named_parameters())
    names = {
        "lora_A": "0.lora_A.default.weight",
        "lora_B": "0.lora_B.default.weight",
        "magnitude": "0.lora_magnitude_vector.default.weight",
    }
    for ours, theirs in names.items():
        parameters[theirs].data = getattr(layer, ours).detach().clone()
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))
    ours, expected = layer(x), reference(x)
    assert float((ours - expected).abs().max()) < 1e-5
    ours.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for name, theirs in names.items():
        gradient = parameters[theirs].grad
        assert float((getattr(layer, name).grad - gradient).norm()) < 1e-4 * float(gradient.norm()), name


def random_network(model, **args: str) -> LoRANetwork:
    network = create_network(model, dim=RANK, alpha=ALPHA, args=args, seed=11)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for layer in network.layers.values():
            for parameter in layer.parameters(recurse=False):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize("args", [{"type": "dora"}, {"type": "lora", "preset": "all", "rank_stabilized": "true"}])
def test_diffusers_loads_the_file(tmp_path, args):
    from diffusers import LTX2Pipeline

    model = models.ours("2.3").requires_grad_(False)
    reference = models.diffusers_model(model, "2.3")
    data = models.uniform(models.inputs("2.3"))
    with torch.no_grad():
        base = models.run_diffusers(reference, data)
        network = random_network(model, **args)
        save_file(network.file_tensors(torch.float32), tmp_path / "a.safetensors")
        loaded = LTX2Pipeline.lora_state_dict(load_file(tmp_path / "a.safetensors"))
        LTX2Pipeline.load_lora_into_transformer(loaded, transformer=reference)
        adapted = [name for name, _ in reference.named_modules() if name.endswith("lora_A")]
        lengths = [name for name, _ in reference.named_parameters() if "magnitude" in name]
        assert len(adapted) == len(network.layers), "diffusers loaded every adapter"
        assert len(lengths) == (len(network.layers) if args["type"] == "dora" else 0), "and every length"
        theirs = models.run_diffusers(reference, data)
        live = model(*models.modalities(data))
    assert models.difference(theirs, base) > 0.1, "the adapter does something"
    assert models.difference(live, theirs) < 1e-4


def test_the_other_dora_key_reads_as_the_same_network(tmp_path):
    model = models.ours("2.3").requires_grad_(False)
    network = random_network(model, type="dora", dora_key="dora_scale", preset="cross")
    tensors = network.file_tensors(torch.bfloat16)
    scales = {name: value for name, value in tensors.items() if name.endswith(".dora_scale")}
    assert len(scales) == len(network.layers) and {(value.ndim, value.shape[1], value.dtype) for value in scales.values()} == {
        (2, 1, torch.float32)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_network(tmp_path / "a.safetensors", dict.fromkeys(network.names))
    for name, layer in network.layers.items():
        assert torch.equal(read.adapters[name].tensors["lora_magnitude_vector"], layer.magnitude)
