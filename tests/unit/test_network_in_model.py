"""Networks of every type in a whole transformer: every linear, compiled blocks, streamed blocks, checkpointing under dropout."""

import pytest
import torch
from torch import Tensor

from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.memory import checkpointing
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.networks.types import TYPES
from musubi_tuner.placement.adapters import bytes_in_flight
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


@pytest.mark.parametrize(("kind", "dim"), [("lora", 2), ("dora", 2), ("lokr", 2), ("lokr", 10_000), ("loha", 2), ("full", 2)])
def test_products_of_frozen_linears_are_kept_and_wide_products_of_adapters_are_not(kind, dim, monkeypatch):
    """LoKr and LoHa add something as wide as the output, a third more to keep. Full weights take the place of frozen ones."""
    products: list[bool] = []

    def kept_by(network_type: str | None) -> int:
        """Products kept in one block, those that give no more than a rank apart."""
        source, _ = make_model(layers=1)
        model = LTXModel(source.config)
        model.requires_grad_(False)
        args = {"type": network_type or "lora"} | ({"include_patterns": r"attn1\.to_q"} if network_type in (None, "full") else {})
        network = create_network(model, dim=dim if network_type else 2, alpha=2, args=args, seed=0)
        real = checkpointing.keeps
        products.clear()

        def keeps(level, max_rank, operation, arguments, **named):
            kept = real(level, max_rank, operation, arguments, **named)
            if operation in checkpointing._LINEARS and checkpointing._LINEARS[operation](arguments)[1] > network.max_rank:
                products.append(kept)
            return kept

        monkeypatch.setattr(checkpointing, "keeps", keeps)
        model.run_block = BlockEngine(
            model.transformer_blocks, [Recompute.NOTHING], max_rank=network.max_rank, keeps_trained=network.trains_base_weights
        )
        step(model, network)
        monkeypatch.setattr(checkpointing, "keeps", real)
        return sum(products)

    frozen = kept_by(None)
    assert frozen > 20 and kept_by(kind) == frozen
    assert kind == "full" or len(products) > frozen, "adapters have products too"


def test_what_adapters_take_in_flight_is_that_of_the_block_that_has_most():
    """LoHa's two factors in float32 and their product; LoKr's inner products and DoRA's own, for each token that a linear reads."""
    for kind, columns in (("loha", 128 * 128 * (4 + 4 + 2)), ("lokr", 1000 * 128 * 2), ("dora", 1000 * 128 * 2)):
        _, network = adapted(kind, layers=2, include_patterns=r"transformer_blocks\.0\.attn1\.to_(q|k)|transformer_blocks\.1\.attn1\.to_q")
        for layer in network.layers.values():
            assert (layer.base.in_features, layer.base.out_features) == (128, 128)
        assert bytes_in_flight(network, video_tokens=1000, audio_tokens=7, compute_bytes=2) == 2 * columns
    assert bytes_in_flight(adapted("lora")[1], video_tokens=1000, audio_tokens=7, compute_bytes=2) == 0
