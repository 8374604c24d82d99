"""What needs a GPU: `python run_tests.py tests/gpu` on a machine that has one; skipped elsewhere."""

import pytest
import torch

from benchmarks.encoder_counts import make_encoder
from musubi_tuner import ltxv2_train_network
from musubi_tuner.encoding.layout import ClipSize, measure_layouts
from musubi_tuner.encoding.pictures import frame_encoder
from musubi_tuner.ltxv2.autoencoders.causal import LAYOUTS
from musubi_tuner.ltxv2.autoencoders.video_vae import TileSizes, VideoVAE
from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.memory.card import measure_rates
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.quantized import QuantizedLinear, dequantize, quantize
from musubi_tuner.memory.streaming import BlockStreamer
from tests import engine_parts
from tests import training_parts as parts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av")


def test_av_run_in_bf16_has_the_losses_of_the_cpu(data, tmp_path):
    for device in ("cpu", "cuda"):
        flags = [*data.arguments("--output_dir", str(tmp_path / device), "--max_train_steps", "4"), "--mixed_precision", "bf16"]
        assert ltxv2_train_network.main([*flags, "--device", device]) == 0
    for ours, theirs in zip(parts.losses(tmp_path / "cuda"), parts.losses(tmp_path / "cpu"), strict=True):
        for name in ours.keys() & {"loss_video", "loss_audio"}:
            assert abs(ours[name] - theirs[name]) < 1e-2, (ours["step"], name)


@pytest.mark.parametrize("flags", [["--blocks_to_swap", "2"], ["--fp8_base"], ["--vram_gb", "2", "--ram_gb", "16"], ["--no-compile"]])
def test_runs_by_plan_and_by_hand(data, tmp_path, flags):
    arguments = data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "3", "--device", "cuda", "--mixed_precision", "bf16")
    assert ltxv2_train_network.main([*arguments, *flags]) == 0
    assert all(0 < row["loss_video"] < 10 for row in parts.losses(tmp_path) if "loss_video" in row)


def test_blocks_compile_to_one_graph():
    model, network = engine_parts.make_model(3)
    wanted = [engine_parts.step(model, network, shape) for shape in engine_parts.SHAPES]
    model.cuda()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    levels = [Recompute.NOTHING] * 3
    model.run_block = BlockEngine(model.transformer_blocks, levels, max_rank=engine_parts.RANK, compiled=True, sequence_axes=sequence_axes)
    for shape, (loss, _) in zip(engine_parts.SHAPES, wanted, strict=True):
        assert abs(engine_parts.step(model, network, shape, device="cuda")[0] - loss) < 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("streamed", "inputs_on_host"), [(5, False), (0, True), (5, True)])
def test_streams_and_events_keep_the_bits(streamed, inputs_on_host):
    """Free slots are filled with NaN: a copy that comes too late, or too early, shows."""
    model, network = engine_parts.make_model(5)
    model.cuda()
    model.run_block = BlockEngine(model.transformer_blocks, [Recompute.EVERYTHING] * 5, max_rank=engine_parts.RANK)
    wanted = [engine_parts.step(model, network, seed=seed, device="cuda") for seed in range(3)]
    streamer = BlockStreamer(list(model.transformer_blocks)[:streamed], CUDA, slots=2, poison=True)
    model.run_block = BlockEngine(
        model.transformer_blocks,
        [Recompute.EVERYTHING] * 5,
        max_rank=engine_parts.RANK,
        streamer=streamer,
        inputs_on_host=inputs_on_host,
    )
    for seed, (loss, gradients) in enumerate(wanted):
        ours, our_gradients = engine_parts.step(model, network, seed=seed, device="cuda")
        assert abs(ours - loss) < 1e-5 and engine_parts.largest_difference(our_gradients, gradients) < 1e-5


@pytest.mark.parametrize("weight_format", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_low_bit_linears_follow_the_dequantized_weight(weight_format, tokens):
    if weight_format == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8 products")
    weight = torch.randn(256, 512) * 512**-0.5
    codes = quantize(weight, weight_format)
    layer = QuantizedLinear(codes, torch.randn(256), 512).cuda()
    x = torch.randn(tokens, 512, device=CUDA).bfloat16().requires_grad_()
    seed = torch.randn(tokens, 256, device=CUDA).bfloat16()
    y = layer(x)
    y.backward(seed)
    exact = dequantize(codes).cuda()
    for ours, theirs in ((y, x.detach().float() @ exact.T + layer.bias), (x.grad, seed.float() @ exact)):
        assert float((ours.detach().float() - theirs).norm() / theirs.norm()) < 0.05


def test_the_card_is_measured():
    rates, low_rates = measure_rates(CUDA)
    assert rates.bf16 > 1e12 and rates.bandwidth > 1e10 and rates.host_to_device > 1e8
    assert set(low_rates) <= {"fp8", "int8"} and all(rate > 1e12 for rate in low_rates.values())


def test_layouts_of_the_video_vae_agree_and_encoding_waits_for_nothing():
    """In tiles, as these once sent their weights to the card by a copy that waits."""
    tiles = TileSizes(pixels=64, pixel_overlap=32, frames=16, frame_overlap=8)
    vae = VideoVAE(make_encoder(CUDA, torch.bfloat16, toy=True), tiles, torch.bfloat16)
    frames = [torch.randint(256, (17, 64, 96, 3), dtype=torch.uint8) for _ in range(2)]
    encode, found = frame_encoder(vae), []
    for layout in LAYOUTS:
        vae.use_layout(layout)
        encode(frames)
        torch.cuda.set_sync_debug_mode("error")
        try:
            begun = encode(frames)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append(torch.stack([one.result().float() for one in begun]))
    usual, turned = found
    assert float((turned - usual).norm() / usual.norm()) < 2e-2
    times = measure_layouts(vae, ClipSize(17, 64, 96), 2)
    assert all(0 < value < 60 for value in times.seconds.values())
