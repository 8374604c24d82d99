"""Training of the world's models: stages that are stopped go on, and the transformer's training keeps what it needs."""

import math
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dev.world import train_transformer
from dev.world.anything import any_frames, any_sound, any_waves
from dev.world.cached import Captions, Clips, Encoders, caption_list, make_clips
from dev.world.fit_audio_encoder import fit_audio_encoder
from dev.world.fit_video_encoder import fit_video_encoder, partial_std
from dev.world.stage import Stage, share_at
from dev.world.transformer import AUDIO_TOKENS, TEXT_TOKENS, VIDEO_TOKENS
from musubi_tuner.ltxv2.autoencoders.audio_vae import log_mel
from musubi_tuner.tiny.world.text import STATES, WIDTH


@pytest.fixture(autouse=True)
def few_levels(monkeypatch):
    monkeypatch.setattr(train_transformer, "_LEVELS", 256)


def small_data(count: int = 8) -> tuple[Captions, Clips]:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, TEXT_TOKENS, WIDTH * STATES, generator=generator).half()
    places = torch.arange(count) % 3
    clips = Clips(
        video=torch.randn(count, VIDEO_TOKENS, 128, generator=generator).half(),
        audio=torch.randn(count, AUDIO_TOKENS, 128, generator=generator).half(),
        captions=places,
        sights=places,
    )
    return Captions(states=states, lengths=torch.tensor([9, 12, 15, 1])), clips


def test_a_stage_that_was_stopped_ends_where_an_undisturbed_one_does(tmp_path):
    def run(name: str, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        stage = Stage(tmp_path / name, "toy", 6, {"model": model, "optimizer": optimizer})
        for step in stage:
            if step == stop_at:
                stage._save()
                break
            generator = torch.Generator().manual_seed(stage.rng(step).getrandbits(60))
            optimizer.zero_grad()
            model(torch.randn(4, 3, generator=generator)).square().mean().backward()
            optimizer.step()
        return model.weight.detach().clone()

    whole = run("whole", None)
    stopped = run("stopped", 3)
    assert not torch.equal(stopped, whole)
    assert torch.equal(run("stopped", None), whole)
    assert torch.equal(run("stopped", None), whole)  # nothing is left to do


def test_the_rate_rises_and_falls():
    shares = [share_at(step, 1000) for step in range(1000)]
    assert shares[0] < 0.05 and max(shares) == 1.0 and shares[200] == 1.0 and shares[-1] < 0.02


def test_clips_get_the_captions_that_they_show(tmp_path):
    """Encoders of the folder, normalized tokens, and places in the list of all captions."""
    frames = any_frames(4, seed=1)
    rng = Stage(tmp_path, "sounds", 0, {}).rng(0)
    mel = log_mel(any_waves([any_sound(rng) for _ in range(4)], rng))
    for name, encoder in (("video", fit_video_encoder(frames)), ("audio", fit_audio_encoder(mel))):
        save_file(
            {**encoder.named(), "mean": torch.zeros(128), "std": partial_std(torch.ones(128))}, tmp_path / f"{name}-encoder.safetensors"
        )
    captions = caption_list()
    clips = make_clips(Encoders(tmp_path, torch.device("cpu")), 5, 0, captions)
    assert clips.video.shape == (5, VIDEO_TOKENS, 128) and clips.audio.shape == (5, AUDIO_TOKENS, 128)
    for whole, sight in zip(clips.captions.tolist(), clips.sights.tolist(), strict=True):
        assert captions[whole].startswith(captions[sight][:-1] + " with a ")
    again = make_clips(Encoders(tmp_path, torch.device("cpu")), 5, 0, captions)
    assert torch.equal(clips.video, again.video) and torch.equal(clips.audio, again.audio)


def test_the_transformer_learns_and_its_average_follows():
    captions, clips = small_data()
    training = train_transformer.Training(captions, clips, batch=4, seed=0)
    first = {name: tensor.clone() for name, tensor in training.average.state_dict().items()}
    seen = []
    for step in range(6):
        training.step(step, 1.0)
        seen.append(training.losses.clone())
        training.losses.zero_()
    assert torch.stack(seen[-2:]).mean(0).lt(torch.stack(seen[:2]).mean(0)).all()
    model, average = training.model.state_dict(), training.average.state_dict()
    for name in ("model.proj_out.weight", "projection.video_aggregate_embed.weight", "audio_register"):
        assert not torch.equal(average[name], first[name]) and not torch.equal(average[name], model[name])


def test_training_goes_on_from_its_state_and_leaves_weights(tmp_path, capsys):
    captions, clips = small_data()
    training = train_transformer.Training(captions, clips, batch=2, seed=0)
    train_transformer.train(training, tmp_path, tmp_path / "out", 0.4, 100)
    kept = load_file(tmp_path / "out" / "transformer.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    state = torch.load(tmp_path / "transformer-state.pt", weights_only=True)
    assert state["step"] > 0 and state["seconds"] >= 0.4

    again = train_transformer.Training(captions, clips, batch=2, seed=5)
    assert train_transformer._resume(again, tmp_path / "transformer-state.pt") == (state["step"], state["seconds"])
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), training.model.state_dict().values(), strict=True))
    train_transformer.train(again, tmp_path, tmp_path / "out", 0.4, 100)  # its time is over: no step more
    assert torch.load(tmp_path / "transformer-state.pt", weights_only=True)["step"] == state["step"]


def test_a_loss_that_is_not_finite_keeps_the_weights_from_before(tmp_path, monkeypatch):
    captions, clips = small_data()
    training = train_transformer.Training(captions, clips, batch=2, seed=0)
    out = tmp_path / "out"
    train_transformer.train(training, tmp_path, out, 0.2, 100)
    before = (out / "transformer.safetensors").read_bytes()
    monkeypatch.setattr(training, "step", lambda number, share: training.losses.fill_(math.nan))
    monkeypatch.setattr(train_transformer, "_TELL_SECONDS", 0)
    with pytest.raises(SystemExit, match="not finite"):
        train_transformer.train(training, tmp_path, out, 1e9, 100)
    assert (out / "transformer.safetensors").read_bytes() == before


def test_a_missing_decoder_library_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(sys, "argv", ["train_transformer", str(tmp_path), "--seconds", "1", "--device", "cpu"])
    with pytest.raises(ImportError):
        train_transformer.main()
    assert not list(tmp_path.iterdir())
