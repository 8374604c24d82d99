"""Samples of rollouts as pictures and sound, one at a time; of both only what is asked for is loaded and decoded."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.cache.names import AUDIO_ENDING, LATENTS_ENDING
from musubi_tuner.cache.store import read_metadata
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.generation.decode import cells_of, sound_decoder, to_frames, video_decoder
from musubi_tuner.ltxv2.autoencoders.audio_vae import audio_vae_fingerprint, audio_vae_names
from musubi_tuner.ltxv2.autoencoders.video_vae import vae_names, video_vae_fingerprint
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.media.write import fit_audio
from musubi_tuner.placement.decoding import tiles_that_fit
from musubi_tuner.reinforcement.rewards.base import RewardSample
from musubi_tuner.reinforcement.rollouts import Rollouts, Sample
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoders:
    """Where they lie."""

    vae: Path | None
    audio_vae: Path | None
    """None: in `vae`."""
    device: torch.device

    def check(self, rollouts: Rollouts, needs: Collection[str]) -> None:
        """
        Raises:
            UserError: what `needs` name has no decoder, or that of another model.
        """
        first = rollouts.samples[0].name
        for need, flag, ending, fingerprint in (
            ("video", "--vae", LATENTS_ENDING, video_vae_fingerprint),
            ("audio", "--audio_vae", AUDIO_ENDING, audio_vae_fingerprint),
        ):
            if need not in needs:
                continue
            if (
                fingerprint(checkpoint := self.checkpoint(need))
                != read_metadata(rollouts.folder / f"{first}{ending}")["encoder_fingerprint"]
            ):
                raise UserError(
                    f"{flag} {checkpoint.path}: is another autoencoder than that of the model which made the rollouts in "
                    f"{rollouts.folder}. Give that model's."
                )

    def checkpoint(self, need: str) -> Checkpoint:
        """Of `video` or `audio`.

        Raises:
            UserError: none is named.
        """
        path = self.vae if need == "video" else self.audio_vae or self.vae
        if path is None:
            raise UserError(
                f"--vae: is needed, to decode {'pictures' if need == 'video' else 'sound'}. Give the checkpoint of the rollouts."
            )
        return open_checkpoint(path)

    def hashes(self, needs: Collection[str]) -> dict[str, str]:
        """Identity of the weights that `needs` name."""
        found = {}
        if "video" in needs:
            found["vae"] = (checkpoint := self.checkpoint("video")).fingerprint(vae_names(checkpoint))
        if "audio" in needs:
            checkpoint = self.checkpoint("audio")
            vocoder = {f"vocoder.{name}": full for name, full in checkpoint.with_prefix("vocoder.").items()}
            found["audio_vae"] = checkpoint.fingerprint({**audio_vae_names(checkpoint), **vocoder})
        return found


Decode = Callable[[Sample], RewardSample]


@contextmanager
def decoding(rollouts: Rollouts, needs: Collection[str], decoders: Decoders) -> Iterator[Decode]:
    """What makes a sample's media, of those that `needs` name, for as long as the context lasts. Nothing is kept."""
    facts = rollouts.facts
    with ExitStack() as held:
        to_sound = held.enter_context(sound_decoder(decoders.checkpoint("audio"), decoders.device)) if "audio" in needs else None
        to_pictures = held.enter_context(_pictures(rollouts, decoders)) if "video" in needs else None

        def decode(sample: Sample) -> RewardSample:
            latents = read_latents(rollouts, sample)
            return RewardSample(
                name=sample.name,
                group=sample.prompt,
                prompt=facts["prompts"][sample.prompt]["prompt"],
                fps=facts["fps"],
                decoded_frames=to_pictures(latents["video"][None].float()) if to_pictures else None,
                decoded_sound=fit_audio(to_sound(latents["audio"][None].float()), facts["frames"] / facts["fps"]) if to_sound else None,
                cached_latents=latents if "latents" in needs else None,
                prompt_sound=rollouts.sound_of(sample.prompt),
            )

        yield decode


@contextmanager
def _pictures(rollouts: Rollouts, decoders: Decoders) -> Iterator[Callable[[Tensor], Tensor]]:
    checkpoint = decoders.checkpoint("video")
    cells = cells_of(read_latents(rollouts, rollouts.samples[0])["video"][None])
    tiles = tiles_that_fit(checkpoint, {cells}, decoders.device)
    with video_decoder(checkpoint, decoders.device) as vae:
        yield lambda latents: to_frames(vae, latents, tiles)


def read_latents(rollouts: Rollouts, sample: Sample) -> dict[str, Tensor]:
    """`video` (128, F, h, w) and, in mode av, `audio` (8, T, 16).

    Raises:
        UserError: a file that is missing or damaged.
    """
    endings = (LATENTS_ENDING, AUDIO_ENDING) if rollouts.facts["mode"] == "av" else (LATENTS_ENDING,)
    tensors = merge_sources([rollouts.folder / f"{sample.name}{ending}" for ending in endings])
    found = {"video": tensors["latents"]}
    return found | ({"audio": tensors["audio_latents"]} if "audio_latents" in tensors else {})
