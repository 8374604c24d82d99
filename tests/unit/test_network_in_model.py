"""Networks of every type in a whole transformer: every linear, compiled blocks, streamed blocks, checkpointing under dropout."""

import pytest
import torch
from torch import Tensor

from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.networks.types import TYPES
from tests.engine_parts import SHAPES, largest_difference, loss_of, make_input, make_model, taken_gradients

DROPOUT = {"rank_dropout": "0.2", "module_dropout": "0.2", "neuron_dropout": "0.1"}


def adapted(kind: str, layers: int = 3, **args: str) -> tuple[LTXModel, LoRANetwork]:
    source, _ = make_model(layers=layers)
    model = LTXModel(source.config)
    model.load_state_dict({name.replace(".base.", "."): value for name, value in source.state_dict().items() if "lora_" not in name})
    model.requires_grad_(False)
    given = {"type": kind} | (DROPOUT if kind != "full" else {"include_patterns": r"attn1\.to_q"})
    network = create_network(model, dim=2, alpha=2, args=given | args, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, network


def step(model: LTXModel, network: LoRANetwork, shape: tuple[int, ...] = SHAPES[0], batch: int = 1) -> list[Tensor]:
    given, targets = make_input(model, shape, batch=batch)
    with network.dropout(range(batch)):
        loss_of(model(given.video, given.audio), targets).backward()
    return taken_gradients(network)


@pytest.mark.parametrize("kind", TYPES)
def test_checkpointing_and_streaming_change_no_gradient(kind):
    plain = step(*adapted(kind), batch=2)
    assert all(gradient is not None for gradient in plain)
    model, network = adapted(kind)
    streamer = BlockStreamer(list(model.transformer_blocks), torch.device("cpu"), slots=2, poison=True)
    model.run_block = BlockEngine(model.transformer_blocks, [Recompute.EVERYTHING] * 3, max_rank=network.max_rank, streamer=streamer)
    assert largest_difference(plain, step(model, network, batch=2)) < 1e-6
    tensors = network.file_tensors(torch.float32)
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values()), "the file does not read what was streamed over"
    other = adapted(kind)[1].file_tensors(torch.float32)
    assert all(torch.equal(value, other[name]) for name, value in tensors.items())


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_one_graph_serves_all_blocks_under_dropout(kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    plain = [step(*adapted(kind, layers=2), shape) for shape in SHAPES[:2]]
    model, network = adapted(kind, layers=2)
    counter = CompileCounterWithBackend("eager")
    model.run_block = BlockEngine(
        model.transformer_blocks, [Recompute.EVERYTHING] * 2, max_rank=2, compiled=True, backend=counter, sequence_axes=sequence_axes
    )
    compiled = [step(model, network, shape) for shape in SHAPES[:2]]
    assert counter.frame_count == 1
    assert max(map(largest_difference, plain, compiled)) < 1e-5


CUT_ONLY = "aot_eager_decomp_partition"


@pytest.mark.parametrize(
    ("level", "streamed", "more"),
    [
        (None, 0, {}),
        (Recompute.EVERYTHING, 3, {}),
        (Recompute.ALL_BUT_ATTENTION, 0, {}),
        (Recompute.EVERYTHING, 3, {"inputs_on_host": True}),
        (Recompute.NOTHING, 0, {"compiled": True, "backend": "eager", "sequence_axes": sequence_axes}),
        (Recompute.EVERYTHING, 3, {"compiled": True, "backend": CUT_ONLY, "sequence_axes": sequence_axes, "inputs_on_host": True}),
    ],
)
def test_recomputed_blocks_drop_what_their_first_run_dropped(level, streamed, more):
    """Linears outside the blocks drop too; batches of other seeds have masks of their own."""
    model, network = adapted("lora", rank_dropout="0.5", include_patterns=r"transformer_blocks|patchify_proj|proj_out")
    inputs = [make_input(model, shape, seed) for seed, shape in enumerate(SHAPES[:2])]

    def gradients(seeds):
        for (batch, targets), own in zip(inputs, seeds, strict=True):
            with network.dropout(own):
                loss_of(model(batch.video, batch.audio), targets).backward()
        return taken_gradients(network)

    wanted = gradients([(5,), (6,)])
    assert largest_difference(wanted, gradients([(5,), (5,)])) > 1e-3, "the masks of the two batches differ"
    torch._dynamo.reset()
    streamer = BlockStreamer(list(model.transformer_blocks)[:streamed], torch.device("cpu"), slots=2, poison=True)
    model.run_block = BlockEngine(model.transformer_blocks, [level] * 3, max_rank=network.max_rank, streamer=streamer, **more)
    assert largest_difference(gradients([(5,), (6,)]), wanted) <= (1e-5 if "compiled" in more else 0)


@pytest.mark.parametrize("kind", TYPES)
def test_every_linear_of_the_model_can_be_adapted(kind):
    model, network = adapted(kind, layers=1, include_patterns=".")
    assert "patchify_proj" in network.names and "adaln_single.emb.timestep_embedder.linear_1" in network.names
    gradients = step(model, network, batch=2)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
