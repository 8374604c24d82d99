"""Samples of the transformer, decoded by the product's own autoencoders from an exported checkpoint, and read by the scorer.

python -m dev.world.evaluate FOLDER [--prompts N] [--device cuda]     FOLDER holds the trained parts
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dev.world.cached import Captions, Encoders, caption_list, character_caption_list, load_captions, load_character_captions
from dev.world.transformer import AUDIO_TOKENS, CHANNELS, VIDEO_CELLS, VIDEO_TOKENS, WorldModel
from musubi_tuner.flow.path import velocity_to_x0
from musubi_tuner.flow.schedule import euler_step, ltx2_sigmas
from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE
from musubi_tuner.ltxv2.autoencoders.vocoder import Vocoder
from musubi_tuner.ltxv2.geometry import unpatchify_audio, unpatchify_video
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.audio import Waveform, resample
from musubi_tuner.tiny.world.checkpoint import write_world_checkpoint
from musubi_tuner.tiny.world.scorer import Hearing, Sight, base_scores, character_scores, hear, hear_mel, see
from musubi_tuner.tiny.world.sounds import RATE
from musubi_tuner.tiny.world.subjects import draw_character, draw_subject

STEPS = 30
_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Reading:
    """Decoded clips, and what was read from them."""

    frames: Tensor
    """(B, 17, 96, 96, 3) 0 to 255"""
    sights: list[Sight]
    from_mel: list[Hearing]
    """Of the spectrograms that the audio decoder gives."""
    from_sound: list[Hearing]
    """Of the vocoder's waveforms."""


class Decoders:
    """The product's decoders."""

    def __init__(self, checkpoint_path: Path, device: torch.device) -> None:
        checkpoint = open_checkpoint(checkpoint_path)
        self._video = VideoVAE.load(checkpoint, device=device, dtype=torch.float32, parts=("decoder",))
        self._audio = AudioVAE.load(checkpoint, device=device, parts=("decoder",))
        self._vocoder = Vocoder.load(checkpoint, device=device)

    def frames(self, tokens: Tensor) -> Tensor:
        """(B, 27, 128) -> (B, 17, 96, 96, 3) 0 to 255, on the CPU."""
        latents = unpatchify_video(tokens.float(), *VIDEO_CELLS)
        pixels = torch.cat([self._video.decode(some) for some in latents.split(_TOGETHER)])
        return ((pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1).cpu()

    def sounds(self, tokens: Tensor) -> list[Waveform]:
        """(B, 18, 128) -> the sound of each clip at the vocoder's rate, on the CPU."""
        return [Waveform(one, self._vocoder.sampling_rate) for one in self._waves(self._mels(tokens))]

    def read(self, video: Tensor, audio: Tensor) -> Reading:
        """Of (B, 27, 128) and (B, 18, 128) normalized tokens."""
        frames, mels = self.frames(video), self._mels(audio)
        waves = resample(self._waves(mels), self._vocoder.sampling_rate, RATE)
        return Reading(frames, [see(one) for one in frames], [hear_mel(one) for one in mels.cpu()], [hear(one) for one in waves])

    def _mels(self, tokens: Tensor) -> Tensor:
        return self._audio.decode(unpatchify_audio(tokens.float()))

    def _waves(self, mels: Tensor) -> Tensor:
        return torch.cat([self._vocoder(some) for some in mels.split(_TOGETHER)]).cpu()


@torch.no_grad()
def sample(model: WorldModel, captions: Captions, places: Tensor, *, guidance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens of both streams by the official schedule: (B, 27, 128) and (B, 18, 128).

    Args:
        places: (B,) of the prompts; the last caption is the negative one.
        guidance: scale of classifier-free guidance for both streams; 1 = none.
    """
    device, batch = places.device, len(places)
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, VIDEO_TOKENS, CHANNELS, generator=generator).to(device)
    audio = torch.randn(batch, AUDIO_TOKENS, CHANNELS, generator=generator).to(device)
    empty = torch.full_like(places, len(captions.lengths) - 1)
    contexts = [captions.of(one) for one in ((places, empty) if guidance != 1 else (places,))]
    sigmas = ltx2_sigmas(STEPS).to(device)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        level = sigma.expand(batch)
        predictions = [model(video, audio, level, level, states, lengths) for states, lengths in contexts]
        clean = [[velocity_to_x0(x, v.float(), sigma) for x, v in zip((video, audio), one)] for one in predictions]
        guided = [values[0] + (guidance - 1) * (values[0] - values[-1]) for values in zip(*clean, strict=True)]
        video, audio = euler_step(video, guided[0], sigma, following), euler_step(audio, guided[1], sigma, following)
    return video, audio


def told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def decibels(frames: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio, the mean over clips."""
    errors = (frames - true.cpu().float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / errors)).mean())


def tell_ceiling(decoders: Decoders, encoders: Encoders, count: int) -> None:
    """What the scorer reads from decoded true latents: no sample can do better."""
    rng = random.Random("ceiling")
    subjects = [draw_subject(rng) for _ in range(count)]
    others = [draw_character(rng) for _ in range(count)]
    frames, waves = encoders.draw(subjects, rng)
    reading = decoders.read(*encoders.encode(frames, waves))
    heard = base_scores(subjects, reading.sights, reading.from_mel)["voice"]
    scores = told(base_scores(subjects, reading.sights, reading.from_sound))
    print(f"true latents, base, {decibels(reading.frames, frames):.1f} dB: {scores}; voice by the audio decoder {heard:.2f}")
    frames, waves = encoders.draw(others, rng)
    reading = decoders.read(*encoders.encode(frames, waves))
    heard = character_scores(others, reading.sights, reading.from_mel)["voice"]
    scores = told(character_scores(others, reading.sights, reading.from_sound))
    print(
        f"true latents, character, {decibels(reading.frames, frames):.1f} dB: {scores}; voice by the audio decoder {heard:.2f}", flush=True
    )


def tell_samples(
    model: WorldModel, decoders: Decoders, captions: Captions, count: int, guidances: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scores of samples of base captions, by guidance; gives the tokens of the last of them."""
    tokens = (torch.empty(0), torch.empty(0))
    rng = random.Random("prompts")
    subjects = [draw_subject(rng) for _ in range(count)]
    listed = {caption: place for place, caption in enumerate(caption_list())}
    places = torch.tensor([listed[one.caption] for one in subjects], device=captions.states.device)
    for guidance in guidances:
        tokens = sample(model, captions, places, guidance=guidance, seed=7)
        reading = decoders.read(*tokens)
        mel = base_scores(subjects, reading.sights, reading.from_mel)["voice"]
        scores = base_scores(subjects, reading.sights, reading.from_sound)
        print(f"{count} samples, guidance {guidance:g}: {told(scores)}; voice by the audio decoder {mel:.2f}", flush=True)
    return tokens


def tell_character(model: WorldModel, decoders: Decoders, folder: Path, count: int, guidance: float) -> None:
    """Scores of samples of the character's captions, which the model does not know."""
    rng = random.Random("character prompts")
    subjects = [draw_character(rng) for _ in range(count)]
    device = next(model.parameters()).device
    captions, listed = load_character_captions(folder).to(device), character_caption_list()
    places = torch.tensor([listed.index(one.caption) for one in subjects], device=device)
    reading = decoders.read(*sample(model, captions, places, guidance=guidance, seed=8))
    print(f"{count} samples of the character: {told(character_scores(subjects, reading.sights, reading.from_sound))}", flush=True)


def evaluate(folder: Path, out: Path, device: torch.device, prompts: int, guidances: Sequence[float]) -> None:
    """Export what was trained, print what it reached, and leave the last samples' tokens in `out`.

    Args:
        folder: holds the autoencoders, the vocoder and captions, and gets the checkpoint.
        out: holds the transformer.
    """
    path = folder / "world.safetensors"
    write_world_checkpoint(path, folder, transformer=out / "transformer.safetensors")
    decoders, captions = Decoders(path, device), load_captions(folder).to(device)
    tell_ceiling(decoders, Encoders(folder, device), prompts)
    model = WorldModel().to(device)
    model.load_state_dict(load_file(out / "transformer.safetensors", device=str(device)))
    video, audio = tell_samples(model.eval(), decoders, captions, prompts, guidances)
    save_file({"video": video.half().cpu().contiguous(), "audio": audio.half().cpu().contiguous()}, out / "samples.safetensors")
    tell_character(model, decoders, folder, prompts, guidances[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="folder of transformer.safetensors; FOLDER itself unless given")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--guidance", type=float, nargs="+", default=(1.0, 3.0))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    evaluate(options.folder, options.out or options.folder, torch.device(options.device), options.prompts, options.guidance)


if __name__ == "__main__":
    main()
