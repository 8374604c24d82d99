"""`ltxv2 checkpoint convert`: what diffusers loads from the folder gives what our own modules give from the checkpoint, and the way
back is the checkpoint. float32, CPU."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_checkpoint
from musubi_tuner.conversion.checkpoint import diffusers_tree
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE, log_mel
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.geometry import audio_positions, patchify_audio, unpatchify_audio, video_positions
from musubi_tuner.ltxv2.quantization import read_quantization
from musubi_tuner.ltxv2.text.connectors import CONTEXT_TOKENS, load_connectors
from musubi_tuner.ltxv2.text.duration import DurationHead
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.transformer.modality import Modality, levels_of
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.tiny.encoders import write_gemma

FRAMES, HEIGHT, WIDTH, STEPS, FPS, LAYERS = 3, 2, 3, 7, 24.0, 4


def convert(*words, code=0):
    assert ltxv2_checkpoint.main(["convert", *map(str, words)]) == code


def close(found, wanted, factor=1.0):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < factor * 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.fixture(scope="module", params=["2.0", "2.3", "2.5"])
def tree(request, tiny_family, tmp_path_factory):
    """A checkpoint of each release as a folder of diffusers with an encoder."""
    folder = tmp_path_factory.mktemp("a folder of diffusers, é")
    gemma, width = tiny_family.gemma, 32
    if request.param == "2.0":  # whose encoder is as wide as its projection, as the release's is
        files, gemma, width = [folder / "ltx2.safetensors"], folder / "gemma", 48
        write_gemma(gemma, width=width)
        tensors, opened = load_file(tiny_family.ltx20), open_checkpoint(tiny_family.ltx20)
        tensors["text_embedding_projection.aggregate_embed.weight"] = torch.randn(width, width * LAYERS) * 0.05
        tensors["vae.per_channel_statistics.channel"] = torch.arange(128)
        save_file(tensors, files[0], metadata=dict(opened.metadata) | {"license": "ltx-2-community"})
    elif request.param == "2.3":
        files = [tiny_family.ltx23]
    else:
        files = [tiny_family.ltx25_transformer, tiny_family.ltx25_vae, tiny_family.ltx25_audio_vae, tiny_family.ltx25_duration_head]
        files, gemma = [*files, tiny_family.ltx25_gemma], tiny_family.gemma4
    convert(*files, "--to", "diffusers", "--output_dir", folder / "tree", "--gemma_path", gemma)
    whole = folder / "joined.safetensors"
    ltxv2_checkpoint.main(["join", *map(str, files[:-1]), "--output", str(whole)]) if len(files) > 1 else shutil.copy(files[0], whole)
    return SimpleNamespace(
        path=folder / "tree",
        files=files,
        checkpoint=open_checkpoint(whole),
        text=open_checkpoint(files[-1]),
        width=width,
        gemma=gemma,
        version=request.param,
    )


@torch.no_grad()
def test_the_transformer_gives_the_same(tree):
    from diffusers import LTX2VideoTransformer3DModel

    theirs = LTX2VideoTransformer3DModel.from_pretrained(tree.path, subfolder="transformer").eval()
    ours = load_transformer(tree.checkpoint, mode="av", device="cpu", dtype=torch.float32, timestep_rule="cross")
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    count, config = FRAMES * HEIGHT * WIDTH, ours.config
    video, audio = random(1, count, 128), random(1, STEPS, 128)
    texts = random(1, 9, config.video_context_width), random(1, 9, config.audio_context_width)
    marker = torch.zeros(1, count, dtype=torch.bool)
    marker[:, : HEIGHT * WIDTH] = True
    levels, sound_levels, extra, more = torch.full((1, count), 0.6), torch.full((1, STEPS), 0.3), {}, {}
    if tree.version == "2.5":
        extra, more = {"keyframe_marker": marker}, {"video_keyframes_mask": marker[..., None].float()}
    one = Modality(
        latent=video, sigma=torch.tensor([0.6]), levels=levels_of(levels)[0], level_index=levels_of(levels)[1],
        positions=video_positions(FRAMES, HEIGHT, WIDTH, torch.full((1,), FPS)), context=texts[0], context_mask=None, **extra,
    )  # fmt: skip
    other = Modality(
        latent=audio, sigma=torch.tensor([0.3]), levels=levels_of(sound_levels)[0], level_index=levels_of(sound_levels)[1],
        positions=audio_positions(STEPS, 1), context=texts[1], context_mask=None,
    )  # fmt: skip
    found = theirs(
        hidden_states=video, audio_hidden_states=audio, encoder_hidden_states=texts[0], audio_encoder_hidden_states=texts[1],
        timestep=levels * 1000, audio_timestep=sound_levels * 1000, sigma=torch.tensor([600.0]), audio_sigma=torch.tensor([300.0]),
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=FPS, audio_num_frames=STEPS, use_cross_timestep=True, return_dict=False, **more,
    )  # fmt: skip
    for left, right in zip(found, ours(one, other), strict=True):
        close(left, right)
    written = json.loads((tree.path / "transformer" / "config.json").read_text())
    section = tree.checkpoint.config["transformer"]
    for key in ("audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim", "audio_in_channels"):
        assert written[key] == section[key]


@torch.no_grad()
def test_the_text_side_gives_the_same(tree):
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    theirs = LTX2TextConnectors.from_pretrained(tree.path, subfolder="connectors").eval()
    extractor = load_feature_extractor(tree.text, tree.width, device="cpu", dtype=torch.float32)
    connectors = load_connectors(tree.checkpoint, device="cpu", dtype=torch.float32)
    length, generator = 5, torch.Generator().manual_seed(2)
    states = [torch.randn(length, tree.width, generator=generator) * (1 + layer) for layer in range(LAYERS)]
    features = extractor(states, [length])
    wanted = connectors(*(one[None] for one in features), torch.tensor([length]))
    padded = torch.nn.functional.pad(torch.stack(states, dim=-1), (0, 0, 0, 0, CONTEXT_TOKENS - length, 0))[None]
    mask = torch.zeros(1, CONTEXT_TOKENS, dtype=torch.long)
    mask[:, CONTEXT_TOKENS - length :] = 1
    for found, expected in zip(theirs(padded.flatten(2), mask), wanted, strict=False):
        close(found, expected)


@torch.no_grad()
def test_both_vaes_and_the_vocoder_give_the_same(tree):
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE

    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(1, 3, 9, 64, 64, generator=generator) * 2 - 1
    ours = VideoVAE.load(tree.checkpoint, device="cpu", dtype=torch.float32)
    theirs = AutoencoderKLLTX2Video.from_pretrained(tree.path, subfolder="vae").eval()
    mean, std = (getattr(theirs, name).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = (theirs.encode(pixels).latent_dist.mode() - mean) / std
    close(latents, ours.encode(pixels))
    close(theirs.decode(latents * std + mean).sample, ours.decode(latents))

    sound = torch.randn(1, 2, 8000, generator=generator) * 0.1
    audio, their_audio = (
        AudioVAE.load(tree.checkpoint, device="cpu"),
        AutoencoderKLLTX2Audio.from_pretrained(tree.path, subfolder="audio_vae"),
    )
    raw = patchify_audio(their_audio.encode(log_mel(sound)).latent_dist.mode())
    tokens = (raw - their_audio.latents_mean) / their_audio.latents_std
    close(unpatchify_audio(tokens), audio.encode(sound))
    mel = audio.decode(unpatchify_audio(tokens))
    close(their_audio.decode(unpatchify_audio(raw)).sample, mel)

    vocoder_class = LTX2Vocoder if tree.version == "2.0" else LTX2VocoderWithBWE
    quiet = torch.randn(1, 2, 9, 64, generator=generator)
    close(vocoder_class.from_pretrained(tree.path, subfolder="vocoder").eval()(quiet), Vocoder.load(tree.checkpoint, device="cpu")(quiet))


def test_the_pipeline_loads_and_makes_a_clip(tree):
    from diffusers import LTX2Pipeline

    pipeline = LTX2Pipeline.from_pretrained(tree.path)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt="a dog barks", width=64, height=64, num_frames=9, frame_rate=24.0, num_inference_steps=2, guidance_scale=1.0,
        output_type="pt", generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert torch.as_tensor(made.frames[0]).shape[0] == 9 and bool(torch.as_tensor(made.frames[0]).isfinite().all())
    assert pipeline.scheduler.config.shift_terminal == 0.1
    assert (pipeline.duration_head is not None) == (tree.version == "2.5")


@torch.no_grad()
def test_the_duration_head_gives_the_same(tree):
    if tree.version != "2.5":
        assert not (tree.path / "duration_head").exists()
        return
    from diffusers.pipelines.ltx2 import LTX2DurationHead

    theirs, ours = LTX2DurationHead.from_pretrained(tree.path, subfolder="duration_head"), DurationHead.load(tree.checkpoint)
    video, audio = torch.randn(1, 6, 128), torch.randn(1, 6, 64)
    assert float(theirs.float()(video, audio)) == pytest.approx(ours.seconds(video, audio), rel=1e-5)


def test_the_way_back_gives_the_same_bytes(tree, tmp_path):
    convert(tree.path, "--to", "single_file", "--output", tmp_path / "back.safetensors")
    back = open_checkpoint(tmp_path / "back.safetensors")
    kept = [name for name in back.names() if name in tree.checkpoint.entries]
    assert kept == [name for name in tree.checkpoint.names()], "all of them, in their order"
    assert {name for name in back.names() if name not in kept} <= {name for name in tree.text.names() if name.startswith("text_emb")}
    for name in kept:
        one, other = back.tensor(name), tree.checkpoint.tensor(name)
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert back.config == tree.checkpoint.config and back.model_version == tree.checkpoint.model_version
    if tree.version == "2.0":
        assert back.metadata["license"] == "ltx-2-community"
        assert (tree.path / "ltxv2_source" / "rest.safetensors").is_file()


@torch.no_grad()
def test_the_diffusion_decoder_of_2_5_gives_the_same(tiny_family, tmp_path):
    from diffusers import LTX2VideoDiffusionDecoderModel

    convert(tiny_family.ltx25_diffusion_vae, "--to", "diffusers", "--output_dir", tmp_path / "tree")
    theirs = LTX2VideoDiffusionDecoderModel.from_pretrained(tmp_path / "tree", subfolder="diffusion_decoder").eval()
    stored = load_file(tiny_family.ltx25_diffusion_vae)
    attention = next(name for name in stored if name.endswith("attn.qkv.weight"))
    own = theirs.state_dict()
    whole = torch.cat([own[attention.replace("qkv", f"to_{letter}")] for letter in "qkv"])
    assert torch.equal(whole, stored[attention])
    convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == set(stored) and all(torch.equal(back[name], stored[name]) for name in stored)


def test_large_models_come_in_shards_and_back(tree, tmp_path, monkeypatch):
    from diffusers import LTX2VideoTransformer3DModel

    monkeypatch.setattr(diffusers_tree, "SHARD_BYTES", 2 * 10**6)
    convert(*tree.files, "--to", "diffusers", "--output_dir", tmp_path / "tree", "--gemma_path", tree.gemma)
    shards = sorted((tmp_path / "tree" / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) >= 3 and all(shard.stat().st_size < 2.2 * 10**6 for shard in shards)
    one = LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "tree", subfolder="transformer").state_dict()
    other = LTX2VideoTransformer3DModel.from_pretrained(tree.path, subfolder="transformer").state_dict()
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "back.safetensors")
    assert set(tree.checkpoint.names()) <= set(open_checkpoint(tmp_path / "back.safetensors").names())
    shards[1].unlink()
    with pytest.raises(UserError, match="not in its folder"):
        convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "again.safetensors")


def test_a_folder_of_another_program_comes_back_by_a_release_file(tree, tmp_path):
    shutil.copytree(tree.path, tmp_path / "tree")
    shutil.rmtree(tmp_path / "tree" / "ltxv2_source")
    with pytest.raises(UserError, match="--like a release file"):
        convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "back.safetensors")
    like = tree.files[0] if len(tree.files) == 1 else tree.checkpoint.path
    if tree.version == "2.5":  # the projection is in another file of the release
        shutil.rmtree(tmp_path / "tree" / "connectors")
        like = tiny_without_connectors(tree.checkpoint, tmp_path)
    convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "back.safetensors", "--like", like)
    back = open_checkpoint(tmp_path / "back.safetensors")
    assert all(torch.equal(back.tensor(name), tree.checkpoint.tensor(name)) for name in back.names())
    assert back.config == open_checkpoint(like).config and len(back.names()) > 500


def tiny_without_connectors(checkpoint, folder):
    values = {name: checkpoint.tensor(name) for name in checkpoint.names() if "_embeddings_connector." not in name}
    save_file(values, folder / "like.safetensors", metadata=dict(checkpoint.metadata))
    return folder / "like.safetensors"


def test_what_diffusers_cannot_hold_is_refused_by_name(tiny_family, tmp_path):
    def refused(path, match, *words):
        with pytest.raises(UserError, match=match):
            convert(path, "--to", "diffusers", "--output_dir", tmp_path / "none", *words)
        assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".none*"))

    def changed(name, tensors, **section):
        config = json.loads(opened.metadata["config"])
        config["transformer"] |= section
        save_file(tensors, tmp_path / name, metadata=dict(opened.metadata) | {"config": json.dumps(config)})
        return tmp_path / name

    opened, tensors = open_checkpoint(tiny_family.ltx23), load_file(tiny_family.ltx23)
    refused(tiny_family.ltx20, "48 x 128.*32 wide", "--gemma_path", tiny_family.gemma)
    refused(tiny_family.ltx23, "by its config .caption_channels., is 48 wide")
    refused(changed("ff.safetensors", tensors, connector_ff_bias=False), "without a bias", "--gemma_path", tiny_family.gemma)
    video = {name: value for name, value in tensors.items() if "audio" not in name or name.startswith("audio_vae")}
    video = {name: value for name, value in video.items() if "av_ca" not in name and "a2v" not in name and "v2a" not in name}
    refused(changed("video.safetensors", video), "of video alone", "--gemma_path", tiny_family.gemma)
    refused(tiny_family.upsampler, "no component of LTX-2|no 'vae' section")
    lacking = {name: value for name, value in tensors.items() if not name.endswith("transformer_blocks.1.attn1.to_q.bias")}
    refused(changed("lacking.safetensors", lacking), "lacks transformer_blocks.1.attn1.to_q.bias", "--gemma_path", tiny_family.gemma)
    refused(tiny_family.ltx23, "is no folder", "--gemma_path", tmp_path / "nowhere")
    refused(tiny_family.ltx23, "type 't5'", "--gemma_path", tiny_family.t5)
    for place in (".", "..", "/"):
        with pytest.raises(UserError, match="must be a folder of its own"):
            convert(tiny_family.ltx23, "--to", "diffusers", "--output_dir", place, "--gemma_path", tiny_family.gemma)
    shutil.copytree(tiny_family.gemma, tmp_path / "gemma")
    for config, match in (
        ({"architectures": "x", "hidden_size": True}, "does not say its class"),
        ({"architectures": ["Gemma3TextModel"], "text_config": 5}, "does not say its class"),
        ({"architectures": ["os"], "hidden_size": 32}, "class os is not in transformers"),
    ):
        (tmp_path / "gemma" / "config.json").write_text(json.dumps({"model_type": "gemma3_text"} | config))
        refused(tiny_family.ltx23, match, "--gemma_path", tmp_path / "gemma")
    with pytest.raises(UserError, match="--output_dir is missing"):
        convert(tiny_family.ltx23, "--to", "diffusers")
    with pytest.raises(UserError, match="--gemma_path: does nothing with --to single_file"):
        convert(tiny_family.ltx23, "--to", "single_file", "--output", tmp_path / "a.safetensors", "--gemma_path", tiny_family.gemma)
    with pytest.raises(UserError, match="is in .* too"):
        convert(tiny_family.ltx25_vae, tiny_family.ltx25_diffusion_vae, "--to", "diffusers", "--output_dir", tmp_path / "none")


def test_a_quantized_checkpoint_is_converted_as_bf16_where_that_is_asked_for(tiny_family, tmp_path):
    ltxv2_checkpoint.main(
        ["quantize", str(tiny_family.ltx23), "--to", "fp8", "--keep_blocks", "0", "--output", str(tmp_path / "fp8.safetensors")]
    )
    words = [tmp_path / "fp8.safetensors", "--to", "diffusers", "--output_dir", tmp_path / "tree", "--gemma_path", tiny_family.gemma]
    with pytest.raises(UserError, match="fp8 e4m3, one scale a row.*--dequantize"):
        convert(*words)
    convert(*words, "--dequantize")
    opened = open_checkpoint(tmp_path / "fp8.safetensors")
    names = transformer_names(opened)
    quantization = read_quantization(opened, names)
    name = "transformer_blocks.1.attn1.to_q.weight"
    wanted = quantization.restored(name, opened.tensor(names[name]), torch.device("cpu"), torch.bfloat16)
    found = load_file(tmp_path / "tree" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], wanted)
    assert not any("scale" in one and "table" not in one and "scale_shift" not in one for one in found)
    convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "bf16.safetensors")
    back = open_checkpoint(tmp_path / "bf16.safetensors")
    assert read_quantization(back, transformer_names(back)).receipt == "" and "_quantization_metadata" not in back.metadata


def test_nothing_is_replaced_unasked_and_nothing_half_is_left(tiny_family, tmp_path, monkeypatch):
    words = [tiny_family.ltx23, "--to", "diffusers", "--output_dir", tmp_path / "tree", "--gemma_path", tiny_family.gemma]
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "my notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        convert(*words)
    with pytest.raises(UserError, match="no folder of diffusers, and is not replaced"):
        convert(*words, "--overwrite")
    assert (tmp_path / "tree" / "my notes.txt").read_text() == "mine"
    (tmp_path / "tree" / "my notes.txt").unlink()
    convert(*words)
    with pytest.raises(UserError, match="is not empty"):
        convert(*words)
    before = (tmp_path / "tree" / "model_index.json").stat().st_ino
    convert(*words, "--overwrite")
    assert (tmp_path / "tree" / "model_index.json").stat().st_ino != before
    monkeypatch.setattr(diffusers_tree.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(TemporaryFailure, match="GB free"):
        convert(*words, "--overwrite")
    assert (tmp_path / "tree" / "model_index.json").is_file() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "change", [{"tensors": {"a": ["../../etc", "x"]}}, {"metadata": 5}, {"tensors": {"a": ["vae", 3]}}, {"tensors": []}]
)
def test_notes_that_someone_changed_are_refused(tiny_family, tmp_path, change):
    convert(tiny_family.ltx25_vae, "--to", "diffusers", "--output_dir", tmp_path / "tree")
    notes = tmp_path / "tree" / "ltxv2_source" / "source.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | change))
    with pytest.raises(UserError, match=r"source.json: is not as"):
        convert(tmp_path / "tree", "--to", "single_file", "--output", tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()
