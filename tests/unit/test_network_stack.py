"""Networks beside a model: what they take of the host while they are read, and of the card while they run."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from musubi_tuner.memory.live_bytes import LiveBytes
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.lora import DOWN, UP
from musubi_tuner.networks.lora_ltxv2 import create_network
from musubi_tuner.networks.reading import read_network
from musubi_tuner.networks.stack import NetworkStack, Strength, _Stacked
from musubi_tuner.networks.types import TYPES

NAME = "transformer_blocks.0.attn1.to_q"


def write_lora(path, *, alpha: float, rows: int = 24, columns: int = 16, rank: int = 4):
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*size, generator=generator).bfloat16() for size in ((rank, columns), (rows, rank)))
    key = f"diffusion_model.{NAME}"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(alpha)}, path)
    return down, up


def test_a_file_is_held_as_it_is_stored_and_scaled_when_it_is_asked_for(tmp_path):
    down, up = write_lora(tmp_path / "lora.safetensors", alpha=2.0)
    adapter = read_network(tmp_path / "lora.safetensors", {NAME: (24, 16)}).adapters[NAME]
    assert {tensor.dtype for tensor in adapter.stored.values()} == {torch.bfloat16}
    found = adapter.tensors
    assert torch.equal(found[DOWN], down.float())
    assert torch.equal(found[UP], up.float() * 0.5)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 24)


def model(blocks: int = 1) -> nn.Module:
    torch.manual_seed(0)
    root = nn.Module()
    root.transformer_blocks = nn.ModuleList([nn.Module() for _ in range(blocks)])
    for block in root.transformer_blocks:
        block.attn1 = Part()
    return root.requires_grad_(False)


def test_what_is_added_is_the_same_with_and_without_gradients(tmp_path):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, alpha in zip(paths, (2.0, 3.0), strict=True):
        write_lora(path, alpha=alpha)
    whole = model()
    stack = NetworkStack(whole, torch.float32)
    stack.use([(path, Strength(0.3, 0.3)) for path in paths])
    linear = whole.transformer_blocks[0].attn1.to_q
    assert isinstance(linear, _Stacked) and len(linear.added) == 2
    x = torch.randn(5, 16)
    with_gradients = linear(x)
    with torch.inference_mode():
        assert torch.equal(linear(x), with_gradients), "bit for bit"
        assert torch.equal(linear(x), with_gradients), "and nothing of the network was written to"


def test_a_network_takes_one_tensor_more_than_the_linear_it_stands_beside(tmp_path):
    write_lora(tmp_path / "lora.safetensors", alpha=4.0)
    whole = model()
    stack = NetworkStack(whole, torch.float32)
    stack.use([(tmp_path / "lora.safetensors", Strength(0.5, 0.5))])
    linear = whole.transformer_blocks[0].attn1.to_q.to("meta")
    for layer, _ in linear.added:
        layer.to("meta")
    x, output = torch.empty(1000, 16, device="meta"), 1000 * 24 * 4
    with LiveBytes() as memory, torch.inference_mode():
        linear(x)
    inner = 1000 * 4 * 4
    assert memory.peak < x.nbytes + 2 * output + inner + 10_000, "the linear's output and the network's, which become the sum"


@pytest.mark.parametrize("kind", TYPES)
def test_beside_streamed_blocks_a_network_does_what_it_does_beside_those_that_stay(tmp_path, kind):
    """The second file comes once the slots have held other blocks' weights."""
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for number, path in enumerate(paths):
        network = create_network(model(3), dim=2, alpha=2, args={"type": kind, "include_patterns": "to_q"}, seed=number)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
        save_file(network.file_tensors(torch.float32), path)
    staying, moving = model(3), model(3)
    streamer = BlockStreamer(moving.transformer_blocks, torch.device("cpu"), slots=2, poison=True)
    stacks = [NetworkStack(whole, torch.float32) for whole in (staying, moving)]
    x = torch.randn(1, 5, 16)
    for path in paths:
        for stack in stacks:
            stack.use([(path, Strength(1, 1))])
        for plain, block in zip(staying.transformer_blocks, moving.transformer_blocks, strict=True):
            streamer.before_forward(block)
            assert torch.equal(block.attn1.to_q(x), plain.attn1.to_q(x))
            assert not torch.equal(plain.attn1.to_q(x), plain.attn1.to_q.base(x)), "the network does something"
            streamer.after_forward(block, last=True)
