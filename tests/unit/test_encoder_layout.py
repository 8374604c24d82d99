"""The video VAE's encoder in each memory layout, frames to pixels, and the benchmark of both."""

import pytest
import torch

from benchmarks import caching
from benchmarks.encoder_counts import count_encoder, make_encoder
from musubi_tuner.encoding.layout import ClipSize, LayoutTimes, measure_layouts, pays, use_fastest_layout
from musubi_tuner.ltxv2.frozen.layout import LAYOUTS, CausalConv3d
from musubi_tuner.ltxv2.frozen.video_vae import TileSizes, VideoVAE, in_unit_range
from musubi_tuner.ltxv2.weights import open_checkpoint

LARGEST_DIFFERENCE = 5e-5
"""Between layouts, in float32, of latents whose spread is about 1; 1.3e-5 was found."""


def random_frames(count: int = 1, frames: int = 17, height: int = 64, width: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("style", ["ltx20", "ltx23"])
def test_layouts_agree_and_the_usual_one_is_diffusers_to_the_bit(tiny_family, style):
    vae = VideoVAE.load(open_checkpoint(getattr(tiny_family, style)), device="cpu", dtype=torch.float32, parts=("encoder",))
    frames = random_frames(2)
    diffusers = vae.encode_frames(frames)
    vae.use_layout("channels_last_3d")
    turned = vae.encode_frames(frames)
    vae.use_layout("contiguous")
    assert torch.equal(vae.encode_frames(frames), diffusers)
    assert float((turned - diffusers).abs().max()) < LARGEST_DIFFERENCE and 0.1 < float(diffusers.std()) < 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_stay_in_the_layout(layout):
    """In bfloat16, as the CPU's float32 convolutions turn their results round."""
    network = make_encoder("cpu", torch.bfloat16, toy=True)
    vae = VideoVAE(network, TileSizes(), torch.bfloat16)
    vae.use_layout(layout)
    found = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append(all(one.is_contiguous(memory_format=LAYOUTS[layout]) for one in (module.weight, inputs[0], output)))

    convolutions = [module.conv for module in network.encoder.modules() if isinstance(module, CausalConv3d)]
    for module in convolutions:
        module.register_forward_hook(look)
    vae.encode_frames(random_frames())
    assert len(found) == len(convolutions) > 8 and all(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frames_become_pixels_through_float32(dtype):
    frames = random_frames(2, 19).permute(0, 4, 1, 2, 3)
    frames[0, 0].view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(in_unit_range(frames, dtype), (frames.float() / 127.5 - 1).to(dtype))
    part = frames[:, :, 2:13, :32, 32:64]
    assert torch.equal(in_unit_range(part, dtype), (part.float() / 127.5 - 1).to(dtype))


@pytest.mark.parametrize("tiles", [TileSizes(), TileSizes(pixels=64, pixel_overlap=32, frames=16, frame_overlap=8)])
def test_frames_and_pixels_have_the_same_latents(tiny_family, tiles):
    checkpoint = open_checkpoint(tiny_family.ltx23)
    for dtype in (torch.float32, torch.bfloat16):
        vae = VideoVAE.load(checkpoint, device="cpu", dtype=dtype, parts=("encoder",), tiles=tiles)
        frames = random_frames()
        assert torch.equal(vae.encode_frames(frames), vae.encode(frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1))


def test_benchmark_of_caching_agrees_and_writes_its_table(tmp_path):
    wanted = ["channels_last_3d", "compiled, channels_last_3d"]
    argv = ["--sizes", "toy", "--device", "cpu", "--rounds", "1", "--backend", "aot_eager", "--output", str(tmp_path)]
    assert caching.main([*argv, "--variants", *wanted]) == 0
    (table,) = tmp_path.glob("*-caching.md")
    text = table.read_text(encoding="utf-8")
    assert text.count("| toy |") == text.count("| toy in tiles |") == 2 + len(wanted)
    assert table.with_suffix(".json").is_file()


def test_benchmark_refuses_latents_that_differ(monkeypatch):
    make = caching.make_encoder
    made = []

    def make_other(*arguments: object, **named: object) -> torch.nn.Module:
        network = make(*arguments, **named)
        if made:
            network.encoder.conv_in.conv.weight.mul_(1.01)
        made.append(network)
        return network

    monkeypatch.setattr(caching, "make_encoder", make_other)
    with pytest.raises(SystemExit, match="toy, channels_last_3d: off by"):
        caching.main(["--sizes", "toy", "--device", "cpu", "--rounds", "1", "--variants", "channels_last_3d"])


def test_counts_grow_with_tiles_and_memory_shrinks():
    whole = count_encoder((17, 64, 96), caching.WHOLE, toy=True)
    tiled = count_encoder((17, 64, 96), caching.TOY_TILES, toy=True)
    assert (whole.tiles, tiled.tiles) == (1, 4)
    assert tiled.flops > whole.flops and tiled.moved_bytes > whole.moved_bytes and tiled.peak_bytes < whole.peak_bytes


def test_a_large_clip_is_encoded_in_less_than_four_gigabytes():
    """1280x704x121 at the released widths, by default tiles; float32 frames held beside them were 1.3 GB more."""
    assert count_encoder(caching.SHAPES["1280x704x121"], TileSizes()).peak_bytes < 3.6e9


def test_measuring_pays_where_it_is_a_tenth_of_the_work():
    large, small = ClipSize(121, 704, 1280), ClipSize(1, 704, 1280)
    assert not pays([large] * 59, large, 1) and pays([large] * 60, large, 1)
    assert not pays([large] * 119, large, 2) and pays([large] * 120, large, 2)
    assert not pays([large, *[small] * 1000], large, 1) and pays([large, *[small] * 8000], large, 1)


def test_layouts_are_measured_on_what_is_encoded_and_the_cpu_is_left_alone(monkeypatch):
    vae = VideoVAE(make_encoder("cpu", torch.float32, toy=True), TileSizes(), torch.float32)
    assert use_fastest_layout(vae, [ClipSize(9, 64, 64)] * 1000, 1) is None
    seen = []
    encode = vae.encode_frames
    monkeypatch.setattr(vae, "encode_frames", lambda frames: seen.append((frames.shape, frames.dtype)) or encode(frames))
    times = measure_layouts(vae, ClipSize(9, 64, 96), 2)
    assert list(times.seconds) == list(LAYOUTS) and all(0 < value < 60 for value in times.seconds.values())
    assert seen == [((2, 9, 64, 96, 3), torch.uint8)] * 6


def test_the_line_names_the_faster_layout_and_what_did_not_fit():
    size = ClipSize(9, 64, 96)
    times = LayoutTimes(size, 2, {"contiguous": 3.0, "channels_last_3d": 1.0})
    assert times.fastest == "channels_last_3d"
    assert times.describe().endswith("channels_last_3d (contiguous 1.500 s, channels_last_3d 0.500 s for a clip of 96x64x9)")
    times = LayoutTimes(size, 1, {"contiguous": 1.0, "channels_last_3d": float("inf")})
    assert times.fastest == "contiguous" and "channels_last_3d out of memory" in times.describe()
    assert LayoutTimes(size, 1, dict.fromkeys(LAYOUTS, float("inf"))).fastest == "contiguous"


def test_a_layout_that_runs_out_of_memory_is_not_taken(monkeypatch):
    vae = VideoVAE(make_encoder("cpu", torch.float32, toy=True), TileSizes(), torch.float32)
    encode = vae._network.encode

    def full(pixels: torch.Tensor) -> object:
        if vae._network.encoder.conv_in.layout == torch.channels_last_3d:
            raise torch.OutOfMemoryError("full")
        return encode(pixels)

    monkeypatch.setattr(vae._network, "encode", full)
    assert measure_layouts(vae, ClipSize(9, 64, 64), 1).seconds["channels_last_3d"] == float("inf")
