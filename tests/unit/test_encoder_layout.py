"""The video VAE's encoder in each memory layout, frames to pixels, and the benchmark of both."""

import pytest
import torch

from benchmarks import caching
from benchmarks.encoder_counts import count_encoder, make_encoder
from musubi_tuner.config.caching import VideoVaeOptions
from musubi_tuner.encoding.layout import ClipSize, LayoutTimes, measure_layouts, pays, use_fastest_layout
from musubi_tuner.ltxv2.autoencoders import video_vae
from musubi_tuner.ltxv2.autoencoders.causal import LAYOUTS, CausalConv3d
from musubi_tuner.ltxv2.autoencoders.video_vae import ENCODER_TILES, TileSizes, VideoVAE, in_unit_range
from musubi_tuner.ltxv2.weights import open_checkpoint

LARGEST_DIFFERENCE = 5e-5
"""Between layouts, in float32, of latents whose spread is about 1; 1.3e-5 was found."""


def random_frames(count: int = 1, frames: int = 17, height: int = 64, width: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("style", ["ltx20", "ltx23"])
def test_layouts_agree_and_the_usual_one_is_diffusers_to_the_bit(tiny_family, style, monkeypatch):
    checkpoint = open_checkpoint(getattr(tiny_family, style))
    frames = random_frames(2)
    with monkeypatch.context() as patch:
        patch.setattr(video_vae, "use_layout", lambda encoder, name: None)
        diffusers = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, parts=("encoder",)).encode_frames(frames)
    vae = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, parts=("encoder",))
    assert torch.equal(vae.encode_frames(frames), diffusers)
    vae.use_layout("channels_last_3d")
    assert 0 < float((vae.encode_frames(frames) - diffusers).abs().max()) < LARGEST_DIFFERENCE
    vae.use_layout("contiguous")
    assert torch.equal(vae.encode_frames(frames), diffusers) and 0.1 < float(diffusers.std()) < 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", ["ltx20", "ltx23"])
def test_a_clip_in_parts_has_the_latents_of_the_whole(tiny_family, style, layout):
    """Parts of one latent frame, of several that fit, of several that do not; one clip after the other."""
    checkpoint = open_checkpoint(getattr(tiny_family, style))
    clips = [random_frames(2, 57, 64, 64), random_frames(1, 9, 64, 96), random_frames(1, 1, 64, 64)]

    def encoded(frames: int) -> list[torch.Tensor]:
        tiles = TileSizes(frames=frames)
        vae = VideoVAE.load(checkpoint, device="cpu", dtype=torch.float32, parts=("encoder",), tiles=tiles)
        vae.use_layout(layout)
        calls.clear()
        vae._network.encoder.register_forward_hook(lambda *given: calls.append(None))
        return [vae.encode_frames(clip) for clip in clips]

    calls: list[None] = []
    whole = encoded(80)
    assert len(calls) == 3
    for frames, parts in ((8, 8 + 2 + 1), (16, 4 + 1 + 1), (24, 3 + 1 + 1)):
        for ours, theirs in zip(encoded(frames), whole, strict=True):
            assert ours.shape == theirs.shape
            assert float((ours - theirs).abs().max()) < LARGEST_DIFFERENCE
        assert len(calls) == parts


def test_a_clip_that_failed_leaves_nothing_to_the_next(monkeypatch):
    network = make_encoder("cpu", torch.float32, toy=True)
    vae = VideoVAE(network, TileSizes(frames=8), torch.float32)
    clip = random_frames(1, 17, 64, 64)
    wanted = vae.encode_frames(clip)
    encode, calls = network.encode, []

    def full(pixels: torch.Tensor) -> object:
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")
        return encode(pixels)

    monkeypatch.setattr(network, "encode", full)
    with pytest.raises(torch.OutOfMemoryError):
        vae.encode_frames(clip)
    assert torch.equal(vae.encode_frames(clip), wanted)


def test_the_flags_have_the_tiles_of_previews():
    flags = VideoVaeOptions()
    assert TileSizes(pixels=flags.vae_spatial_tile_size, frames=flags.vae_temporal_tile_size) == ENCODER_TILES


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
    assert (whole.calls, tiled.calls) == (1, 4)
    assert tiled.flops > whole.flops and tiled.moved_bytes > whole.moved_bytes and tiled.peak_bytes < whole.peak_bytes


def test_a_large_clip_is_encoded_in_less_than_four_gigabytes():
    """1280x704x121 at the released widths, without tiles and in parts of 32 frames: no operation is done twice."""
    counts = count_encoder(caching.SHAPES["1280x704x121"], ENCODER_TILES)
    assert counts.calls == 4 and counts.peak_bytes < 3.8e9
    assert counts.flops < 1.001 * count_encoder(caching.SHAPES["1280x704x121"], caching.WHOLE).flops


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
