"""The world's models: constructed encoders equal the official networks, and its checkpoint goes through the product's own loaders."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dev.world.anything import any_frames, any_sound, any_waves
from dev.world.fit_audio_encoder import fit_audio_encoder
from dev.world.fit_video_encoder import fit_video_encoder, partial_std, to_pixels
from dev.world.muon import Muon, orthogonalized
from dev.world.train_audio_decoder import thin_decoder
from dev.world.train_video_decoder import new_decoder
from dev.world.train_vocoder import new_vocoder
from dev.world.transformer import TEXT_TOKENS, WorldModel
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE, log_mel
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.geometry import patchify_audio
from musubi_tuner.ltxv2.text.connectors import load_connectors
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.transformer.modality import Modality
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.text import STATES, WIDTH


class Parts:
    """Weights as training keeps them, decoders untrained, and the checkpoint that is made of them."""

    def __init__(self, folder: Path) -> None:
        frames = any_frames(6, seed=1)
        rng = random.Random(2)
        self.mel = log_mel(any_waves([any_sound(rng) for _ in range(6)], rng))
        self.pixels = to_pixels(frames[:2])
        self.video, self.audio = fit_video_encoder(frames), fit_audio_encoder(self.mel)
        means = self.video.encode(self.pixels).transpose(0, 1).flatten(1)
        tokens = patchify_audio(self.audio.encode(self.mel)).flatten(0, 1)
        self.thin = thin_decoder()
        torch.manual_seed(3)
        self.model = WorldModel().requires_grad_(False)
        for parameter in self.model.parameters():  # nothing is left at zero, where it could not be told from something missing
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).bfloat16())
        encoders = ((self.video, means.mean(1), partial_std(means.std(1))), (self.audio, tokens.mean(0), partial_std(tokens.std(0))))
        for name, (encoder, mean, std), decoder in zip(("video", "audio"), encoders, (new_decoder(), self.thin), strict=True):
            named = under("encoder.", encoder.named()) | under("decoder.", decoder.state_dict()) | {"mean": mean, "std": std}
            save_file(named, folder / f"{name}.safetensors")
        save_file(under("vocoder.", dict(new_vocoder().vocoder.named_parameters())), folder / "vocoder.safetensors")
        save_file(under("", self.model.state_dict()), folder / "transformer.safetensors")
        write_world_checkpoint(folder / "world.safetensors", folder)
        self.checkpoint = open_checkpoint(folder / "world.safetensors")


def under(prefix: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in named.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts(tmp_path_factory.mktemp("world"))


def test_the_video_encoder_equals_the_official_network(parts):
    vae = VideoVAE.load(parts.checkpoint, device="cpu", dtype=torch.float32)
    statistics = [vae._network.latents_mean, vae._network.latents_std]
    mean, std = (one[:, None, None, None] for one in statistics)
    latents = vae.encode(parts.pixels)
    assert latents.std() > 0.3
    torch.testing.assert_close(latents, (parts.video.encode(parts.pixels) - mean) / std, rtol=1e-4, atol=1e-4)
    assert vae.decode(latents).shape == parts.pixels.shape


def test_bfloat16_hardly_moves_the_latents(parts):
    exact, rounded = (
        VideoVAE.load(parts.checkpoint, device="cpu", dtype=dtype, parts=("encoder",)).encode(parts.pixels)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (rounded - exact).square().mean().sqrt() < 0.02


def test_the_audio_encoder_equals_the_official_network(parts):
    rng = random.Random(5)
    waves = any_waves([any_sound(rng) for _ in range(2)], rng)
    vae = AudioVAE.load(parts.checkpoint, device="cpu")
    mean, std = vae._network.latents_mean, vae._network.latents_std
    tokens = patchify_audio(vae.encode(waves))
    torch.testing.assert_close(tokens, (patchify_audio(parts.audio.encode(log_mel(waves))) - mean) / std, rtol=1e-4, atol=1e-4)


def test_a_thin_audio_decoder_decodes_the_same_in_the_whole_one(parts):
    vae = AudioVAE.load(parts.checkpoint, device="cpu")
    latents = torch.randn(1, 8, 5, 16, generator=torch.Generator().manual_seed(1))
    whole = vae.decode(latents)
    tokens = patchify_audio(latents) * vae._network.latents_std + vae._network.latents_mean
    with torch.no_grad():
        for parameter in parts.thin.parameters():
            parameter.copy_(parameter.bfloat16())
        thin = parts.thin(tokens.unflatten(2, (8, 16)).transpose(1, 2))
    torch.testing.assert_close(whole, thin, rtol=1e-4, atol=1e-4)


def test_the_vocoders_second_stage_adds_nothing(parts):
    vocoder = Vocoder.load(parts.checkpoint, device="cpu")
    mel = parts.mel[:1, :, :20]
    wave = vocoder(mel)
    first = vocoder._network.vocoder(mel)
    assert vocoder.sampling_rate == 48000 and wave.shape[-1] == 3 * first.shape[-1]
    assert first.detach().std() > 1e-4
    assert float((wave[..., ::3] - first).detach().std()) < 0.2 * float(first.detach().std())


def test_one_register_stands_for_all_of_them(parts):
    """The context of few tokens that is trained with does what the connectors' 1024 tokens do."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([9, 14])
    hidden = [torch.randn(int(lengths.sum()), WIDTH, generator=generator) for _ in range(STATES)]
    video, audio = torch.randn(2, 27, 128, generator=generator), torch.randn(2, 18, 128, generator=generator)
    sigma, sound_sigma = torch.tensor([0.3, 0.9]), torch.tensor([0.7, 0.2])
    states = torch.zeros(2, TEXT_TOKENS, WIDTH * STATES)
    stacked = torch.stack(hidden, -1)
    normalized = (stacked * torch.rsqrt(stacked.square().mean(1, keepdim=True) + 1e-6)).flatten(1)
    for row, tokens in enumerate(normalized.split(lengths.tolist())):
        states[row, : len(tokens)] = tokens
    short = parts.model(video, audio, sigma, sound_sigma, states, lengths)

    extractor = load_feature_extractor(parts.checkpoint, WIDTH, device="cpu", dtype=torch.float32)
    features = extractor(hidden, lengths.tolist())
    padded = [torch.nn.utils.rnn.pad_sequence(list(one.split(lengths.tolist())), batch_first=True) for one in features]
    contexts = load_connectors(parts.checkpoint, device="cpu", dtype=torch.float32)(*padded, lengths)
    model = load_transformer(parts.checkpoint, mode="av", device="cpu", dtype=torch.float32)
    places = (parts.model.video_positions, parts.model.audio_positions)
    inputs = [
        Modality(latent=x, sigma=level, levels=level[:, None], level_index=None, positions=position.expand(2, -1, -1, -1), context=context)
        for x, level, position, context in zip((video, audio), (sigma, sound_sigma), places, contexts, strict=True)
    ]
    whole = model(*inputs)
    for mine, true in zip(short, whole, strict=True):
        assert true.std() > 0.1
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


def test_orthogonalized_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.4


def test_muon_goes_on_from_its_state():
    """Two steps in a row, and two with a stop in between, end in the same place."""

    def stepped(stops: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (4, 6), (5, 2, 3), (7,))]
        optimizer = Muon(made[:3], made[3:], rate=0.02, other_rate=1e-3, decay=0.01)
        for step in range(2):
            if stops and step == 1:
                state = optimizer.state_dict()
                optimizer = Muon(made[:3], made[3:], rate=0.02, other_rate=1e-3, decay=0.01)
                optimizer.load_state_dict(state)
            for one in made:
                one.grad = torch.randn(one.shape, generator=generator)
            optimizer.set_share(0.5)
            optimizer.step()
        return [one.detach() for one in made]

    assert all(torch.equal(a, b) for a, b in zip(stepped(False), stepped(True), strict=True))
