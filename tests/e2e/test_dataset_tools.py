"""Cached clips back into files that play: the same size, length and rate, pictures and sound as the autoencoders give them back."""

import av
import pytest
import torch

from musubi_tuner import ltxv2_dataset
from musubi_tuner.curation import decoding
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.probe import probe_video
from musubi_tuner.media.video import read_frames
from musubi_tuner.runtime.errors import UserError
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    """Two clips with sound, one of them held out, and a still."""
    folder = tmp_path_factory.mktemp("to decode")
    made = parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "av", tiny_family.gemma)
    parts.write_clips(folder / "clips", count=1, frames=17)
    parts.write_clips(folder / "held out", count=1, frames=9, seed=3)
    sets = ('[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache/clips"\ntarget_frames = [17]\n',
            '[[validation_datasets]]\nvideo_directory = "held out"\ncache_directory = "cache/held"\ntarget_frames = [9]\n')  # fmt: skip
    made.toml.write_text("[general]\nresolution = [64, 64]\n" + "".join(sets), encoding="utf-8")
    parts.cache(made)
    return made


def decode(data, output, *words, code=0):
    common = [str(data.toml), "--ltxv2_model", str(data.model), "--device", "cpu", "--output_dir", str(output)]
    assert ltxv2_dataset.main(["decode", *common, *words]) == code


def test_what_comes_back_is_what_the_decoder_gives(data, tmp_path, capsys, monkeypatch):
    written, write = {}, decoding.write_video
    monkeypatch.setattr(decoding, "write_video", lambda path, frames, *rest: written.update({path: frames}) or write(path, frames, *rest))
    decode(data, tmp_path)
    one, held = sorted(tmp_path.rglob("*.mp4"))
    assert (one.parent.name, held.parent.name) == ("datasets_0", "validation_datasets_0")
    info = probe_video(one)
    assert (info.width, info.height) == (64, 64)
    (file,) = (data.folder / "cache" / "clips").glob("*_ltxv2.safetensors")
    (latents,) = parts.read_tensors(file).values()
    vae = VideoVAE.load(open_checkpoint(data.model), device="cpu", dtype=torch.float32, parts=("decoder",))
    pixels = ((vae.decode(latents.float()[None])[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255)
    assert float((written[one].float() - pixels).abs().max()) <= 0.51, "before H.264"
    assert read_frames(info, tuple(range(17)), 64, 64).shape == written[one].shape
    with av.open(str(one)) as container:
        assert len(container.streams.audio) == 1
    assert "17 frames, 64x64, with sound" in capsys.readouterr().out


def test_clips_are_chosen_by_name_and_holes_are_named(data, tmp_path, capsys):
    for idle in (["nothing*"], ["*", "nothing*"]):
        with pytest.raises(UserError, match=r"--clips nothing\*: no clip of .* is called so. Its clips: "):
            decode(data, tmp_path, "--clips", *idle)
    assert not list(tmp_path.rglob("*.mp4"))
    (file,) = (data.folder / "cache" / "held").glob("*_ltxv2.safetensors")
    away = file.rename(file.with_suffix(".away"))
    try:
        decode(data, tmp_path, code=1)
    finally:
        away.rename(file)
    assert "not cached" in capsys.readouterr().out and len(list(tmp_path.rglob("*.mp4"))) == 1
