"""Rollouts of the world's policy in memory: groups of samples by the product's recorder, scores by its rewards, batches for its objective.

What differs from the programs: the samples of a group are made in one batch, so their stochastic steps draw from one generator, and no file
lies between. What rules, advantages and rewards do is the product's own code.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dev.world.lab import Lab
from dev.world.transformer import AUDIO_TOKENS, CHANNELS, TEXT_TOKENS, VIDEO_CELLS, VIDEO_TOKENS, WorldModel
from musubi_tuner.dataset.batch import Batch
from musubi_tuner.flow.path import velocity_to_x0
from musubi_tuner.flow.schedule import ltx2_sigmas
from musubi_tuner.flow.sigma import SigmaSettings, draw_sigma
from musubi_tuner.ltxv2.geometry import unpatchify_audio, unpatchify_video
from musubi_tuner.ltxv2.transformer.modality import Modality, Perturbations, Velocity
from musubi_tuner.media.write import fit_audio
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from musubi_tuner.reinforcement.rewards.base import NoScore, Reward, RewardSample
from musubi_tuner.reinforcement.rollouts import Rollouts, Sample
from musubi_tuner.reinforcement.sampling import Recorder, Stochastic
from musubi_tuner.runtime.draws import generator_for
from musubi_tuner.tiny.world.scenes import FPS, FRAMES

_TOGETHER = 32
"""Samples at once where no step is drawn."""


class WorldWrapper(OfficialLTXV2Wrapper):
    """The world's model as the objectives call it: text is states (B, 15, 128) of captions, its mask says which of them are tokens."""

    def __init__(self, world: WorldModel) -> None:
        super().__init__(world.model, "sd3_0_1")
        self._world = [world]  # not as a module of its own: the transformer is one already

    def forward(
        self,
        video: Modality | None,
        audio: Modality | None,
        text: Tensor,
        text_mask: Tensor | None = None,
        perturbations: Perturbations | None = None,
    ) -> Velocity:
        assert video is not None and audio is not None and text_mask is not None and perturbations is None
        return self._world[0].of_inputs(video, audio, text, text_mask.sum(1))


@dataclass(frozen=True, slots=True)
class Kept(Rollouts):
    """Rollouts that were never written."""

    recorded: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    """Stochastic steps by sample."""

    def steps_of(self, name: str) -> dict[str, Tensor]:
        return self.recorded[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Samples as tokens, in the order of `samples`."""

    samples: Sequence[Sample]
    prompts: Sequence[str]
    """All of them; a sample has the number of its own."""
    video: Tensor
    """(N, 27, 128)"""
    audio: Tensor
    """(N, 18, 128)"""
    recorded: Mapping[str, dict[str, Tensor]]

    def kept(self, stochastic: Stochastic | None) -> Kept:
        """As the objectives read them."""
        drawn = None if stochastic is None else {"kind": stochastic.kind, "level": stochastic.level, "streams": list(stochastic.streams)}
        return Kept(Path(), {"sampling": {"stochastic": drawn}}, self.recorded)

    @property
    def groups(self) -> dict[int, tuple[str, ...]]:
        """Names of samples by prompt."""
        return {one.prompt: tuple(other.name for other in self.samples if other.prompt == one.prompt) for one in self.samples}


@torch.no_grad()
def make_clips(
    model: WorldModel,
    lab: Lab,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    steps: int,
    stochastic: Mapping[int, Stochastic] | None = None,
) -> Clips:
    """Samples without guidance.

    Args:
        stochastic: by prompt, which steps are drawn; None = none, Euler's alone.
    """
    if stochastic is None:
        batches = [samples[start : start + _TOGETHER] for start in range(0, len(samples), _TOGETHER)]
    else:
        batches = [[one for one in samples if one.prompt == prompt] for prompt in stochastic]
        samples = [one for batch in batches for one in batch]
    levels, parts, recorded = ltx2_sigmas(steps), [], {}
    for batch in batches:
        states, lengths = lab.text([prompts[one.prompt] for one in batch])

        def predict(
            values: Mapping[str, Tensor], sigma: Tensor, step: int, states: Tensor = states, lengths: Tensor = lengths
        ) -> dict[str, Tensor]:
            level = sigma.expand(len(states))
            velocity = model(values["video"], values["audio"], level, level, states, lengths)
            assert velocity.video is not None and velocity.audio is not None
            return {name: velocity_to_x0(values[name], getattr(velocity, name), sigma) for name in values}

        noise = {
            name: torch.stack([torch.randn(count, CHANNELS, generator=generator_for(one.seed, "preview", name)) for one in batch])
            for name, count in (("video", VIDEO_TOKENS), ("audio", AUDIO_TOKENS))
        }
        recorder = Recorder(None if stochastic is None else stochastic[batch[0].prompt])
        seed = batch[0].seed
        parts.append(recorder("euler", noise, levels, predict, lambda _, values: values, seed=seed, advance=lambda: None))
        recorded |= {one.name: recorder.steps(place) for place, one in enumerate(batch)}
    # what the cache holds is rounded to bfloat16
    video, audio = (torch.cat([part[name] for part in parts]).bfloat16().float() for name in ("video", "audio"))
    return Clips(samples=samples, prompts=prompts, video=video, audio=audio, recorded=recorded)


@torch.no_grad()
def scores_of(clips: Clips, reward: Reward, lab: Lab) -> dict[str, float | None]:
    """By sample; decodes what the reward needs."""
    frames = lab.decoders.frames(clips.video).round().to(torch.uint8) if "video" in reward.needs else None
    sounds = lab.decoders.sounds(clips.audio) if "audio" in reward.needs else None
    judged = reward.score(
        [
            RewardSample(
                name=one.name,
                group=one.prompt,
                prompt=clips.prompts[one.prompt],
                fps=float(FPS),
                decoded_frames=None if frames is None else frames[place],
                decoded_sound=None if sounds is None else fit_audio(sounds[place], FRAMES / FPS),
            )
            for place, one in enumerate(clips.samples)
        ]
    )
    return {one.name: None if isinstance(score, NoScore) else score for one, score in zip(clips.samples, judged, strict=True)}


def batch_of(
    clips: Clips, names: Sequence[str], keys: Sequence[str], lab: Lab, levels: SigmaSettings, turns: Sequence[str], seed: int
) -> Batch:
    """Samples as a batch of training, both streams at the same noise level.

    Args:
        names: of the samples.
        keys: what the objective knows them by.
        turns: names of the appearance of each of them, for its draws.
    """
    places = {one.name: place for place, one in enumerate(clips.samples)}
    chosen = [places[name] for name in names]
    states, lengths = lab.text([clips.prompts[clips.samples[place].prompt] for place in chosen])
    generators = [generator_for(seed, turn) for turn in turns]
    sigma = torch.tensor([draw_sigma(levels, VIDEO_TOKENS, generator) for generator in generators])
    noise = [[torch.randn(count, CHANNELS, generator=one) for one in generators] for count in (VIDEO_TOKENS, AUDIO_TOKENS)]
    ones = torch.ones(len(names))
    return Batch(
        names=tuple(keys),
        latents=unpatchify_video(clips.video[chosen], *VIDEO_CELLS),
        fps=ones * FPS,
        text=states,
        text_mask=torch.arange(TEXT_TOKENS)[None] < lengths[:, None],
        audio_latents=unpatchify_audio(clips.audio[chosen]),
        audio_lengths=torch.full((len(names),), AUDIO_TOKENS),
        audio_padded=False,
        video_noise=torch.stack(noise[0]),
        audio_noise=torch.stack(noise[1]),
        video_sigma=sigma,
        audio_sigma=sigma,
        video_weight=ones,
        audio_weight=ones,
        dropout_seeds=tuple(random.Random(f"{seed}|{turn}").getrandbits(60) for turn in turns),
    )
