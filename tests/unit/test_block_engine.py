"""Recompute levels, compiled blocks and streaming give what the plain model gives."""

import dataclasses
import itertools
import logging

import pytest
import torch

from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.memory.checkpointing import Recompute, keeps
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.quantized import Codes, QuantizedLinear, dequantize, quantize
from musubi_tuner.memory.streaming import BlockStreamer, spread
from musubi_tuner.networks.lora import adds_everywhere, group_projections
from tests import engine_parts as parts


def engine(model, levels, **options) -> BlockEngine:
    return BlockEngine(model.transformer_blocks, levels, max_rank=parts.RANK, **options)


def saved_bytes(model, network) -> int:
    """Bytes that one step keeps for its backward pass, weights apart."""
    kept: dict[int, int] = {}
    frozen = {tensor.data_ptr() for tensor in model.state_dict().values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts.step(model, network, parts.SHAPES[2])
    return sum(kept.values())


def put_in_few_bits(model, weight_format) -> dict[str, Codes]:
    """Replace the large linears of all blocks; {name: what each was replaced by}."""
    found = {}
    for name, module in list(model.named_modules()):
        if "transformer_blocks" in name and name.endswith(("base", "net.2", "proj")):
            found[name] = quantize(module.weight.data, weight_format)
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).add_module(leaf, QuantizedLinear(found[name], module.bias.data, module.in_features))
    return found


@pytest.mark.parametrize("level", [*Recompute, None])
def test_every_recompute_level_gives_the_same_bits(level):
    model, network = parts.make_model(3)
    plain = parts.step(model, network)
    model.run_block = engine(model, [level] * 3)
    loss, gradients = parts.step(model, network)
    assert loss == plain[0]
    assert parts.largest_difference(gradients, plain[1]) == 0


def test_sums_are_kept_where_all_projections_have_one():
    for args, expected in (({}, True), ({"exclude_patterns": "['audio_attn1']"}, False), ({"type": "dora"}, False)):
        model, _ = parts.make_model(1, args=args)
        assert adds_everywhere(model.transformer_blocks) == expected


def test_first_halves_that_run_together_are_kept():
    """Queries, keys and values have one thin product; wide ones by trained weights, as LoKr's, are recomputed."""
    x = torch.zeros(3, 64)
    for outputs, kept in ((parts.RANK, True), (3 * parts.RANK, True), (64, False)):
        weight = torch.zeros(64, outputs, requires_grad=True)
        assert keeps(Recompute.NOTHING, parts.RANK, torch.ops.aten.mm.default, (x, weight), sums=True) == kept


def test_blocks_may_stand_on_different_levels():
    model, network = parts.make_model(4)
    plain = parts.step(model, network)
    model.run_block = engine(model, list(Recompute))
    loss, gradients = parts.step(model, network)
    assert loss == plain[0] and parts.largest_difference(gradients, plain[1]) == 0


def test_whole_recomputation_keeps_less_than_half():
    """MEM-03."""
    model, network = parts.make_model(4)
    plain = saved_bytes(model, network)
    model.run_block = engine(model, [Recompute.EVERYTHING] * 4)
    assert saved_bytes(model, network) < 0.5 * plain


@pytest.mark.parametrize(("streamed", "slots"), [(1, 2), (3, 2), (5, 2), (5, 3), (5, 1)])
@pytest.mark.parametrize("level", [Recompute.NOTHING, Recompute.EVERYTHING, None])
def test_streamed_blocks_give_the_same_bits(streamed, slots, level):
    """Free slots are filled with NaN, so that any read of a slot that does not hold its block shows."""
    model, network = parts.make_model(5)
    wanted = [parts.step(model, network, seed=seed) for seed in range(3)]
    given, _ = parts.make_input(model, parts.SHAPES[1])
    with torch.no_grad():
        preview = model(given.video, given.audio)
    blocks = [model.transformer_blocks[i] for i in spread(5, streamed)]
    streamer = BlockStreamer(blocks, torch.device("cpu"), slots=slots, poison=True)
    model.run_block = engine(model, [level] * 5, streamer=streamer)
    for seed, (loss, gradients) in enumerate(wanted):
        ours, our_gradients = parts.step(model, network, seed=seed)
        assert ours == loss and parts.largest_difference(our_gradients, gradients) == 0
        with torch.no_grad():
            seen = model(given.video, given.audio)
        assert torch.equal(seen.video, preview.video) and torch.equal(seen.audio, preview.audio)


@pytest.mark.parametrize("streamed", [0, 5])
def test_inputs_on_the_host_give_the_same_bits(streamed):
    model, network = parts.make_model(5)
    wanted = [parts.step(model, network, shape) for shape in parts.SHAPES]
    streamer = BlockStreamer(list(model.transformer_blocks)[:streamed], torch.device("cpu"), slots=2, poison=True)
    model.run_block = engine(model, [Recompute.EVERYTHING] * 5, streamer=streamer, inputs_on_host=True)
    for shape, (loss, gradients) in zip(parts.SHAPES, wanted, strict=True):
        ours, our_gradients = parts.step(model, network, shape)
        assert ours == loss and parts.largest_difference(our_gradients, gradients) == 0


def test_a_stale_slot_shows():
    """The comparison above can fail: a streamer that does not come back for the backward pass spoils the gradients."""
    model, network = parts.make_model(5)
    wanted = parts.step(model, network)
    streamer = BlockStreamer(list(model.transformer_blocks), torch.device("cpu"), slots=2, poison=True)
    streamer.before_backward = lambda block: None
    streamer.after_backward = lambda block: None
    model.run_block = engine(model, [None] * 5, streamer=streamer)
    loss, gradients = parts.step(model, network)
    assert loss == wanted[0] and not parts.largest_difference(gradients, wanted[1]) < 1e-3


def test_a_pass_that_was_cut_short_does_not_spoil_the_next():
    model, network = parts.make_model(5)
    wanted = parts.step(model, network)
    streamer = BlockStreamer(list(model.transformer_blocks), torch.device("cpu"), slots=2, poison=True)
    model.run_block = engine(model, [Recompute.EVERYTHING] * 5, streamer=streamer)
    given, _ = parts.make_input(model, parts.SHAPES[1])
    model(given.video, given.audio)  # and no backward pass
    loss, gradients = parts.step(model, network)
    assert loss == wanted[0] and parts.largest_difference(gradients, wanted[1]) == 0


def test_streamed_weights_leave_only_slots_on_the_device():
    model, _ = parts.make_model(5)
    size = sum(t.numel() * t.element_size() for t in model.transformer_blocks[0].parameters() if not t.requires_grad)
    streamer = BlockStreamer(list(model.transformer_blocks), torch.device("cpu"), slots=2)
    assert 2 * size <= streamer.device_bytes < 2.2 * size
    assert 5 * size <= streamer.host_bytes < 5.5 * size


def test_streamed_blocks_are_evenly_spread():
    assert spread(48, 48) == list(range(48))
    for blocks, streamed in itertools.product((5, 48), range(1, 6)):
        chosen = spread(blocks, streamed)
        gaps = [b - a for a, b in itertools.pairwise([chosen[-1] - blocks, *chosen])]
        assert len(set(chosen)) == streamed and max(gaps) - min(gaps) <= 1


CUT_ONLY = "aot_eager_decomp_partition"
"""Captures and partitions as the real compiler does, and runs the graphs uncompiled: ten seconds instead of half a minute."""
CAPTURE_ONLY = "eager"
"""Captures the graph of the forward pass alone, and runs it uncompiled: two seconds."""


@pytest.mark.parametrize(
    ("level", "backend", "streamed"),
    [(Recompute.NOTHING, "inductor", 0), (Recompute.ALL_BUT_ATTENTION, CUT_ONLY, 3), (Recompute.EVERYTHING, CAPTURE_ONLY, 0)],
)
def test_one_graph_serves_all_blocks_and_lengths(level, backend, streamed, request):
    """No graph break over four lengths and three blocks, streamed or not. The kernels of the first add adapters in place."""
    if backend == "inductor":
        request.getfixturevalue("cpp_compiler")
    model, network = parts.make_model(3)
    group_projections(model)
    wanted = [parts.step(model, network, shape) for shape in parts.SHAPES]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    streamer = BlockStreamer(list(model.transformer_blocks)[:streamed], torch.device("cpu"), slots=2, poison=True) if streamed else None
    assert adds_everywhere(model.transformer_blocks)
    model.run_block = engine(
        model, [level] * 3, keeps_sums=True, compiled=True, backend=backend, sequence_axes=sequence_axes, streamer=streamer
    )
    for shape, (loss, gradients) in zip(parts.SHAPES, wanted, strict=True):
        ours, our_gradients = parts.step(model, network, shape)
        assert abs(ours - loss) < 1e-5 and parts.largest_difference(our_gradients, gradients) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_batches_of_many_kinds_share_a_run():
    """Masks, given frames and batch sizes need graphs of their own, more than torch's limit of them (lower here than its default)."""
    model, network = parts.make_model(1)
    kinds = [(1, False, False, False), (1, True, False, False), (1, False, True, False), (1, False, False, True), (2, True, True, True)]
    inputs = [_input_of_kind(model, *kind) for kind in kinds]
    wanted = []
    for given, targets in inputs:
        parts.loss_of(model(given.video, given.audio), targets).backward()
        wanted.append(parts.taken_gradients(network))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=len(kinds) - 1, accumulated_recompile_limit=len(kinds) - 1):
        model.run_block = engine(model, [Recompute.EVERYTHING], compiled=True, backend=CAPTURE_ONLY, sequence_axes=sequence_axes)
        assert torch._dynamo.config.recompile_limit >= 2 * 2**3, "two batch sizes and three features, in any combination"
        for (given, targets), theirs in zip(inputs, wanted, strict=True):
            parts.loss_of(model(given.video, given.audio), targets).backward()
            assert parts.largest_difference(parts.taken_gradients(network), theirs) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(kinds)


def _input_of_kind(model, batch, given_frame, text_masked, sound_masked):
    given, targets = parts.make_input(model, parts.SHAPES[0], batch=batch)
    video, audio = given.video, given.audio
    if given_frame:
        index = (torch.arange(video.latent.shape[1]) < 6).long().expand(batch, -1)
        video = dataclasses.replace(video, levels=torch.cat([video.levels, 0 * video.levels], 1), level_index=index)
    if text_masked:
        mask = (torch.arange(32) < 29).expand(batch, -1)
        video, audio = dataclasses.replace(video, context_mask=mask), dataclasses.replace(audio, context_mask=mask)
    if sound_masked:
        mask = (torch.arange(audio.latent.shape[1]) < 7).expand(batch, -1)
        audio = dataclasses.replace(audio, token_mask=mask)
    return dataclasses.replace(given, video=video, audio=audio), targets


def test_passes_without_gradients_are_compiled_while_the_model_trains(caplog):
    """One more graph for all blocks and lengths (a teacher's), of which the user is told, and none for validation and previews."""
    caplog.set_level(logging.INFO)
    model, network = parts.make_model(3)
    inputs = [parts.make_input(model, shape)[0] for shape in parts.SHAPES]
    with network.disabled(), torch.no_grad():
        wanted = [model(given.video, given.audio) for given in inputs]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.run_block = engine(model, [Recompute.NOTHING] * 3, compiled=True, backend=CUT_ONLY, sequence_axes=sequence_axes)
    for training, graphs in ((False, 0), (True, 1)):
        model.train(training)
        with network.disabled(), torch.no_grad():
            seen = [model(given.video, given.audio) for given in inputs]
        assert max(parts.largest_difference(ours, theirs) for ours, theirs in zip(seen, wanted, strict=True)) < 1e-5
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == caplog.text.count("compiling the blocks")


@pytest.mark.parametrize("dropout", [{}, {"rank_dropout": "0.4", "module_dropout": "0.3"}, {"neuron_dropout": "0.3"}])
def test_grouped_adapters_give_what_single_ones_give(dropout):
    model, network = parts.make_model(3, args={"rank_dropout": "0"} | dropout)
    with network.dropout((5,)):
        wanted = [parts.step(model, network, shape) for shape in parts.SHAPES]
    assert group_projections(model) == 3 * 6
    with network.dropout((5,)):
        for shape, (loss, gradients) in zip(parts.SHAPES, wanted, strict=True):
            ours, our_gradients = parts.step(model, network, shape)
            assert abs(ours - loss) < 1e-5 and parts.largest_difference(our_gradients, gradients) < 1e-6
    with network.disabled(), torch.no_grad():
        given, targets = parts.make_input(model, parts.SHAPES[0])
        base = float(parts.loss_of(model(given.video, given.audio), targets))
    assert abs(base - wanted[0][0]) > 1e-4, "a network that is switched off is off in groups too"


@pytest.mark.parametrize(("level", "backend"), [(Recompute.NOTHING, CAPTURE_ONLY), (Recompute.EVERYTHING, CUT_ONLY)])
def test_grouped_adapters_compile_to_one_graph(level, backend):
    model, network = parts.make_model(2)
    wanted = [parts.step(model, network, shape) for shape in parts.SHAPES]
    group_projections(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.run_block = engine(model, [level] * 2, compiled=True, backend=backend, sequence_axes=sequence_axes)
    for shape, (loss, gradients) in zip(parts.SHAPES, wanted, strict=True):
        ours, our_gradients = parts.step(model, network, shape)
        assert abs(ours - loss) < 1e-5 and parts.largest_difference(our_gradients, gradients) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_low_bit_blocks_keep_no_more_than_others():
    """Where everything is recomputed. Without a policy torch 2.11 keeps what autograd functions make within the block; 2.13 does not."""
    kept = {}
    for weight_format in (None, "fp8"):
        torch._dynamo.reset()
        model, network = parts.make_model(2)
        if weight_format:
            put_in_few_bits(model, weight_format)
        model.run_block = engine(model, [Recompute.EVERYTHING] * 2, compiled=True, backend=CUT_ONLY, sequence_axes=sequence_axes)
        parts.step(model, network, parts.SHAPES[2])
        kept[weight_format] = saved_bytes(model, network)
    assert kept["fp8"] <= kept[None]


@pytest.mark.parametrize(("weight_format", "tolerance"), [("fp8", 0.06), ("int8", 0.02), ("nf4", 1e-5)])
def test_low_bit_blocks_give_what_their_dequantized_weights_give(weight_format, tolerance):
    """Streamed, on every recompute level. What is left is the rounding of activations and gradients to fp8 and int8."""
    exact, exact_network = parts.make_model(3)
    low, network = parts.make_model(3)
    for name, codes in put_in_few_bits(low, weight_format).items():
        exact.get_submodule(name).weight.data = dequantize(codes)
    wanted = parts.step(exact, exact_network)
    streamer = BlockStreamer(list(low.transformer_blocks), torch.device("cpu"), slots=2, poison=True)
    for level in Recompute:
        low.run_block = engine(low, [level] * 3, streamer=streamer)
        loss, gradients = parts.step(low, network)
        ours, theirs = (torch.cat([one.flatten() for one in found]) for found in (gradients, wanted[1]))
        assert abs(loss - wanted[0]) < tolerance * wanted[0]
        assert float((ours - theirs).norm() / theirs.norm()) < max(tolerance, 1e-4)
        assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.99
