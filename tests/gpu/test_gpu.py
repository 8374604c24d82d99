"""What needs a GPU: `python run_tests.py tests/gpu` on a machine that has one; skipped elsewhere."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.encoder_counts import make_encoder
from musubi_tuner import ltxv2_train_network
from musubi_tuner.conditioning.conditions import each_tensor
from musubi_tuner.encoding.layout import ClipSize, measure_layouts
from musubi_tuner.encoding.pictures import frame_encoder
from musubi_tuner.ltxv2.autoencoders.causal import LAYOUTS
from musubi_tuner.ltxv2.autoencoders.video_vae import DECODER_TILES, TileSizes, VideoVAE
from musubi_tuner.ltxv2.transformer.block import sequence_axes
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.memory.attention import try_kernels, use_attention, use_default_attention
from musubi_tuner.memory.card import cap_device_memory, measure_rates, room_left
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.memory.pinning import PinningFailed, pin, pinned_bytes, pinned_memory
from musubi_tuner.memory.quantized import QuantizedLinear, dequantize, quantize
from musubi_tuner.memory.streaming import BlockStreamer
from musubi_tuner.placement.decoding import tiles_that_fit
from musubi_tuner.training import loop
from tests import engine_parts
from tests import training_parts as parts
from tests.e2e.test_full_finetuning import argv as full_finetuning
from tests.unit import test_streamed_states as streamed_states

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def whole_card():
    """A run with --vram_gb caps the allocator for as long as its process lives."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av")


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-3), ("bf16", 1e-2)])
def test_av_run_has_the_losses_of_the_cpu(data, tmp_path, precision, tolerance):
    """In a process each, as accelerate takes its precision once."""
    for device in ("cpu", "cuda"):
        flags = data.arguments("--output_dir", str(tmp_path / device), "--max_train_steps", "4", "--weight_format", "bf16")
        flags += ["--mixed_precision", precision, "--device", device]
        subprocess.run([sys.executable, "-m", "musubi_tuner.ltxv2_train_network", *flags], check=True)
    for ours, theirs in zip(parts.losses(tmp_path / "cuda"), parts.losses(tmp_path / "cpu"), strict=True):
        for name in ours.keys() & {"loss_video", "loss_audio"}:
            assert abs(ours[name] - theirs[name]) < tolerance, (ours["step"], name)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer_type", "AdamW"],
        ["--optimizer_type", "AdamW", "--no-compile"],
        ["--optimizer_type", "Adafactor", "--max_grad_norm", "0", "--fused_backward_pass"],
        ["--optimizer_type", "AdamW8bit", "--max_grad_norm", "0", "--fused_backward_pass"],
    ],
)
def test_full_finetuning_has_the_losses_of_the_cpu(data, tmp_path, flags):
    """In bf16, where what is rounded at random is drawn by each device in its own way."""
    for device in ("cpu", "cuda"):
        given = full_finetuning(data, tmp_path / device, "--mixed_precision", "bf16", "--device", device, *flags)
        subprocess.run([sys.executable, "-m", "musubi_tuner.ltxv2_train_network", *given], check=True)
    for ours, theirs in zip(parts.losses(tmp_path / "cuda"), parts.losses(tmp_path / "cpu"), strict=True):
        for name in ours.keys() & {"loss_video", "loss_audio"}:
            assert abs(ours[name] - theirs[name]) < 0.05, (ours["step"], name)


@pytest.mark.parametrize("flags", [["--blocks_to_swap", "2"], ["--fp8_base"], ["--vram_gb", "2", "--ram_gb", "16"], ["--no-compile"]])
def test_runs_by_plan_and_by_hand(data, tmp_path, flags):
    arguments = data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "3", "--device", "cuda", "--mixed_precision", "bf16")
    assert ltxv2_train_network.main([*arguments, *flags]) == 0
    assert all(0 < row["loss_video"] < 10 for row in parts.losses(tmp_path) if "loss_video" in row)


@pytest.mark.parametrize("flags", [[], ["--fp8_base"], ["--no-compile"]])
def test_steps_wait_for_nothing(data, tmp_path, monkeypatch, flags):
    """What waits for the card says so in sync debug mode, with the line of the program; the first step may, as it compiles."""
    waits, run_step = [], loop._optimizer_step

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                return run_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits.append([f"{Path(one.filename).name}:{one.lineno}" for one in found if "synchronizing" in str(one.message)])

    monkeypatch.setattr(loop, "_optimizer_step", watched)
    arguments = data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "4", "--device", "cuda", "--mixed_precision", "bf16")
    assert ltxv2_train_network.main([*arguments, *flags]) == 0
    assert waits[1:] == [[]] * 3, waits


_CHOSEN = """
import sys, torch, torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from musubi_tuner.memory.attention import use_attention
use_attention(sys.argv[1:])
q, k, v = (torch.randn(1, 4, 256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
for mask in (None, (torch.arange(256, device="cuda") < 200)[None, None, None]):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    print(" ".join(event.key for event in found.key_averages() if "scaled_dot_product" in event.key and "backward" in event.key))
"""


@pytest.mark.parametrize(
    ("order", "plain", "masked"),
    [
        (("flash", "efficient", "math"), "flash", "efficient"),
        (("flash", "cudnn", "efficient", "math"), "flash", "cudnn"),
        (("efficient", "math"), "efficient", "efficient"),
        (("cudnn", "math"), "cudnn", "cudnn"),
    ],
)
def test_the_kernels_that_are_chosen_run_from_the_first_attention_on(order, plain, masked):
    """With a mask and without, in a process of its own, as torch sets its order at the first attention of a process."""
    command = [sys.executable, "-c", _CHOSEN, *order]
    first, second = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout.splitlines()
    assert f"_scaled_dot_product_{plain}_attention_backward" in first and f"_scaled_dot_product_{masked}_attention_backward" in second


@pytest.mark.parametrize("masked", [False, True])
def test_every_kernel_that_runs_gives_what_plain_products_give(masked):
    times = try_kernels(CUDA, torch.bfloat16, tokens=1001, heads=4, head_dim=128)
    assert times.plain and times.masked and "flash" not in times.masked
    mask = (torch.arange(1001, device=CUDA) < 900)[None, None, None] if masked else None
    q, k, v = (torch.randn(1, 4, 1001, 128, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    try:
        use_attention(("math",))
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float()
        for name in times.masked if masked else times.plain:
            use_attention((name,))
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float()
            assert float((found - wanted).norm() / wanted.norm()) < 1e-2, name
    finally:
        use_default_attention()


def test_the_allocator_ends_at_the_cap():
    torch.cuda.empty_cache()
    cap_device_memory(CUDA, 1.0)
    assert torch.empty(2**29, dtype=torch.uint8, device=CUDA).numel() == 2**29
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**30 + 2**22, dtype=torch.uint8, device=CUDA)


def test_memory_is_pinned_at_its_exact_size_and_a_refusal_leaves_no_error():
    buffer = pinned_memory(50_000_000)
    assert buffer.is_pinned() and pinned_bytes() >= 50_000_000
    with pytest.raises(PinningFailed):  # it is registered already
        pin(buffer)
    assert torch.ones(4, device=CUDA).sum().item() == 4
    buffer.fill_(7)
    assert bool((buffer.to(CUDA, non_blocking=True) == 7).all())
    held = pinned_bytes()
    del buffer
    assert pinned_bytes() == held - 50_000_000


@pytest.mark.parametrize("compiled", [False, True])
def test_padded_clips_have_the_losses_of_the_cpu(compiled):
    """Masks of text, pictures and sound at odd lengths; weights in bf16, so that every kernel may be chosen."""
    model, network = engine_parts.make_model(3)
    given, targets = engine_parts.make_input(model, (3, 4, 5, 17), batch=2)
    given = engine_parts.with_masks(given)
    wanted = engine_parts.loss_of(model(given.video, given.audio), targets)
    wanted.backward()
    gradients = torch.cat([gradient.flatten() for gradient in engine_parts.taken_gradients(network)])
    trained = {id(parameter) for parameter in network.parameters()}
    for parameter in model.cuda().parameters():
        if id(parameter) not in trained:
            parameter.data = parameter.data.bfloat16()
    levels = [Recompute.NOTHING] * 3
    model.run_block = BlockEngine(
        model.transformer_blocks, levels, max_rank=engine_parts.RANK, compiled=compiled, sequence_axes=sequence_axes
    )
    given = each_tensor(given, lambda tensor: tensor.cuda())
    loss = engine_parts.loss_of([one.float() for one in model(given.video, given.audio)], [target.cuda() for target in targets])
    loss.backward()
    ours = torch.cat([gradient.flatten().cpu() for gradient in engine_parts.taken_gradients(network)])
    assert abs(loss.item() - wanted.item()) < 1e-2
    assert float((ours - gradients).norm() / gradients.norm()) < 3e-2


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


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
@pytest.mark.parametrize("level", [None, Recompute.EVERYTHING])
def test_trained_blocks_that_travel_back_keep_the_bits(name, level):
    """With their states, in both of which free slots are filled with NaN."""
    args = {"fused": "True"} if name == "AdamW" else {"min_8bit_size": "1"}
    plain, ours = (streamed_states.model_of(torch.bfloat16, "cuda") for _ in range(2))
    streamer = streamed_states.streamed(ours, 5, 2, level)
    one, other = streamed_states.steps_with(plain, name, **args), streamed_states.steps_with(ours, name, streamer, **args)
    assert streamed_states.train(ours, other, range(1, 9)) == streamed_states.train(plain, one, range(1, 9))
    streamed_states.compare(plain, ours, streamer, one, other)


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


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_streamed_layers_of_a_text_encoder_give_the_same_states(tmp_path, kind):
    pytest.importorskip("transformers.models.gemma3" if kind == "gemma3" else "transformers.models.gemma4_unified")
    from musubi_tuner.ltxv2.text.encoders import encoder_options, load_encoder
    from musubi_tuner.placement.text import load_streamed
    from musubi_tuner.tiny.encoders import write_gemma, write_gemma4

    (write_gemma if kind == "gemma3" else write_gemma4)(tmp_path / "gemma", layers=7)
    options = encoder_options(str(tmp_path / "gemma"), tokenizer=None, backend="gemma", device=CUDA, max_length=None)
    prompts = ["A dog barks.", "The rain taps on the roof while an old man waits quietly beside the neon sign."]
    wanted = load_encoder(options).encode(prompts).layers
    encoder = load_streamed(options, [0, 2, 3, 5, 6], poison=True)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(encoder.encode(prompts).layers, wanted, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_neighborhood_attention_of_the_diffusion_decoder_is_that_of_the_cpu(dtype, tolerance):
    from musubi_tuner.ltxv2.autoencoders.neighborhood import neighborhood_attention

    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(1, 9, 20, 13, 2, 64, generator=generator) for _ in range(3)]
    given[0] *= 0.125
    wanted = neighborhood_attention(*given, (3, 7, 7))
    found = neighborhood_attention(*(one.to(CUDA, dtype) for one in given), (3, 7, 7))
    assert float((found.float().cpu() - wanted).norm()) < tolerance * float(wanted.norm())


def test_decoders_are_fitted_to_what_is_left_below_the_cap(tiny_family):
    cap_device_memory(CUDA, 1.0)
    room = room_left(CUDA)
    assert 0 < room <= 2**30
    held = torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    assert room_left(CUDA) <= room - held.nbytes
    vae = open_checkpoint(tiny_family.ltx23)
    assert tiles_that_fit(vae, [(4, 8, 8)], CUDA) == DECODER_TILES
    del held
    rest = torch.empty(room - 2**22, dtype=torch.uint8, device=CUDA)
    assert tiles_that_fit(vae, [(16, 32, 48)], CUDA) == DECODER_TILES[-1:], "nothing fits, and the smallest are tried"
    del rest
