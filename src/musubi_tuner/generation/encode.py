"""What a prompt's files condition its sample on: pictures, clips, sound and references, encoded to latents before a model is loaded.

The result is what a training batch carries too: latents with the conditioning in its place, and which tokens of them are clean.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.conditioning.conditions import NO_CONDITIONS, Conditions, KeyframeLatents, Reference, StreamConditions
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.prompts.prompt import PreviewPrompt, Span
from musubi_tuner.runtime.device import compute_dtype, free_memory
from musubi_tuner.runtime.errors import UserError

if TYPE_CHECKING:
    from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE
    from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE

_STILL_FRAMES = geometry.TEMPORAL_SCALE + 1
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningLatents:
    """Of one sample; batch 1."""

    video: Tensor | None = None
    """(1, 128, F, h, w) latents, zero where they are to be generated; None = no conditioning of them."""
    audio: Tensor | None = None
    """(1, 8, T, 16)"""
    conditions: Conditions = NO_CONDITIONS


TEXT_ALONE = ConditioningLatents()


class ConditioningEncoders:
    """The VAEs' encoders, loaded at first use."""

    def __init__(
        self,
        vae: Checkpoint,
        audio_vae: Checkpoint,
        device: torch.device,
        *,
        still_crf: int | None,
        reference_factors: tuple[int, int] = (1, 1),
    ) -> None:
        """
        Args:
            still_crf: of the H.264 that stills go through first (`still_crf`); None = they are encoded as they are.
        """
        self.device = device
        self.reference_factors = reference_factors
        self.still_crf = still_crf
        self._vae, self._audio_vae = vae, audio_vae
        self._video: VideoVAE | None = None
        self._audio: AudioVAE | None = None

    def video(self, frames: Tensor) -> Tensor:
        """(F, H, W, 3) uint8 -> (1, 128, f, h, w) normalized latents on the CPU."""
        from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE

        if self._video is None:
            self._video = VideoVAE.load(self._vae, device=self.device, dtype=compute_dtype(self.device), parts=("encoder",))
        pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return self._video.encode(pixels).float().cpu()

    def audio(self, samples: Tensor) -> Tensor:
        """(2, samples) at 16 kHz -> (1, 8, T, 16) normalized latents on the CPU."""
        from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE

        if self._audio is None:
            self._audio = AudioVAE.load(self._audio_vae, device=self.device, parts=("encoder",))
        return self._audio.encode(samples[None]).float().cpu()

    def close(self) -> None:
        self._video, self._audio = None, None
        free_memory(self.device)


def still_crf(version: str) -> int:
    """The constant rate factor that official ltx-pipelines compress conditioning images with: 33 up to model 2.3, 18 from 2.4 on.

    Args:
        version: such as `2.3`.
    """
    return 33 if tuple(map(int, version.split("."))) <= (2, 3) else 18


def encode_conditioning(prompt: PreviewPrompt, streams: tuple[str, ...], encoders: ConditioningEncoders) -> ConditioningLatents:
    """Everything that a prompt's files condition its sample on.

    Raises:
        UserError: what the sample has no stream for, a file that is too short or cannot be read, or nothing left to be generated.
    """
    _check_streams(prompt, streams)
    video, clean_video = _video(prompt, encoders) if "video" in streams else (None, None)
    audio, clean_audio = _audio(prompt, encoders) if "audio" in streams else (None, None)
    reference, reference_audio = _reference(prompt, encoders), None
    keyframes = _keyframes(prompt, encoders) if "video" in streams else None
    if prompt.inputs.reference_audio is not None:
        reference_audio = Reference(latents=encoders.audio(_read_audio(prompt, prompt.inputs.reference_audio, beside_pictures=False)))
    if all(one is None for one in (video, audio, reference, reference_audio, keyframes)):
        return TEXT_ALONE
    clean = [tokens for tokens in (clean_video, clean_audio) if tokens is not None]
    if len(clean) == len(streams) and all(bool(tokens.all()) for tokens in clean):
        raise UserError(
            f"{prompt.where}: the conditioning covers it all, and nothing is left to be generated. Give --vt, --box, --crop or --at."
        )
    return ConditioningLatents(
        video=video,
        audio=audio,
        conditions=Conditions(
            video=StreamConditions(
                clean=None if clean_video is None else clean_video.flatten()[None],
                reference=reference,
                keyframes=keyframes,
                strength=None if clean_video is None else _strengths_in_place(prompt, clean_video).flatten()[None],
            ),
            audio=StreamConditions(clean=None if clean_audio is None else clean_audio[None], reference=reference_audio),
        ),
    )


def video_cells(prompt: PreviewPrompt) -> tuple[int, int, int]:
    """(F, h, w) in latent cells."""
    width, height = geometry.latent_size(prompt.width, prompt.height)
    return geometry.latent_frames(prompt.frames), height, width


def audio_steps(prompt: PreviewPrompt) -> int:
    """T, latents of 1/25 s."""
    return geometry.audio_latent_steps(prompt.frames, prompt.fps)


def token_count(prompt: PreviewPrompt, stream: str) -> int:
    """Tokens of the sample itself; those of keyframes and of a reference come behind them."""
    return audio_steps(prompt) if stream == "audio" else math.prod(video_cells(prompt))


def _check_streams(prompt: PreviewPrompt, streams: tuple[str, ...]) -> None:
    inputs = prompt.inputs
    pictures = {
        "--i": inputs.image,
        "--ei": inputs.end_image,
        "--k": inputs.keyframes,
        "--kp": inputs.keyframes_in_place,
        "--iv": inputs.video,
        "--v": inputs.reference,
    }
    sounds = {"--a": inputs.audio, "--ra": inputs.reference_audio}
    for stream, flags in (("video", pictures), ("audio", sounds)):
        named = [flag for flag, value in flags.items() if value]
        if named and stream not in streams:
            what = "pictures" if stream == "video" else "sound (stills and --ltx_mode video have none)"
            raise UserError(f"{prompt.where}: {named[0]} is given, but this sample has no {what}.")


def _video(prompt: PreviewPrompt, encoders: ConditioningEncoders) -> tuple[Tensor | None, Tensor | None]:
    """Latents with the conditioning in its place, and which (F, h, w) cells are conditioning."""
    inputs, cells = prompt.inputs, video_cells(prompt)
    pictures = dict(inputs.keyframes_in_place)
    if inputs.image is not None:
        pictures[0] = inputs.image
    if inputs.video is None and not pictures:
        return None, None
    latents = torch.zeros(1, geometry.LATENT_CHANNELS, *cells)
    clean = _kept_video(prompt)
    if inputs.video is not None:
        _lay_clip(prompt, latents, clean, encoders)
    for frame, path in pictures.items():
        cell = -(-frame // geometry.TEMPORAL_SCALE)  # latent frame 0 holds the first frame alone, each other one eight
        latents[:, :, cell] = _encode_still(path, prompt, encoders, first=cell == 0)
        clean[cell] = True
    return latents, clean


def _strengths_in_place(prompt: PreviewPrompt, clean: Tensor) -> Tensor:
    """(F, h, w) float32 of cells that are conditioning: 1, but for pictures of another strength."""
    strengths = torch.ones(clean.shape)
    own = dict(prompt.inputs.strengths)
    for frame, _ in prompt.inputs.keyframes_in_place:
        strengths[-(-frame // geometry.TEMPORAL_SCALE)] = own.get(frame, 1.0)
    if prompt.inputs.image is not None:
        strengths[0] = prompt.inputs.image_strength
    return strengths


def _keyframes(prompt: PreviewPrompt, encoders: ConditioningEncoders) -> KeyframeLatents | None:
    """Pictures beside the sample, each encoded alone: all that the prompt names but for the first image, which is in place."""
    pictures = dict(prompt.inputs.keyframes)
    if prompt.inputs.end_image is not None:
        pictures[prompt.frames - 1] = prompt.inputs.end_image
    if not pictures:
        return None
    strengths = dict((*prompt.inputs.strengths, *prompt.inputs.strengths_beside))
    return KeyframeLatents(
        latents=torch.stack([_encode_still(path, prompt, encoders, first=True) for path in pictures.values()], dim=2),
        frames=torch.tensor([[*pictures]], dtype=torch.int32),
        fps=torch.tensor([prompt.fps]),
        strengths=torch.tensor([[strengths.get(frame, 1.0) for frame in pictures]]),
    )


def _lay_clip(prompt: PreviewPrompt, latents: Tensor, kept: Tensor, encoders: ConditioningEncoders) -> None:
    """The input clip into `latents`, as far as any of it is kept; a crop is filled by the whole picture."""
    inputs = prompt.inputs
    frames_kept = kept.flatten(1).any(1).nonzero()
    if not len(frames_kept):
        raise UserError(f"{prompt.where}: --vt leaves nothing of --iv {inputs.video} to start from.")
    assert inputs.video is not None
    needed = int(frames_kept[-1]) + 1
    place = inputs.crop
    width, height = (place.width, place.height) if place is not None else (prompt.width, prompt.height)
    top, left = (place.top, place.left) if place is not None else (0, 0)
    frames = _read_clip(prompt.where, "--iv", inputs.video, (needed - 1) * geometry.TEMPORAL_SCALE + 1, prompt.fps, (width, height))
    rows, columns = (
        slice(start // geometry.SPATIAL_SCALE, (start + size) // geometry.SPATIAL_SCALE) for start, size in ((top, height), (left, width))
    )
    latents[:, :, :needed, rows, columns] = encoders.video(frames)
    latents *= kept


def _encode_still(path: Path, prompt: PreviewPrompt, encoders: ConditioningEncoders, *, first: bool) -> Tensor:
    """(1, 128, h, w) of the first latent frame, which is one picture, or of a later one, which is the picture standing still."""
    from musubi_tuner.media.picture import as_video_frame, cover_and_crop, read_picture

    still = read_picture(path)
    if encoders.still_crf is not None:
        try:
            still = as_video_frame(still, encoders.still_crf)
        except ValueError as error:
            raise UserError(f"{prompt.where}: {path}: {error}.") from error
    picture = cover_and_crop(still, prompt.width, prompt.height)[None]
    return encoders.video(picture if first else picture.expand(_STILL_FRAMES, -1, -1, -1))[:, :, -1]


def _read_clip(where: str, flag: str, path: Path, frames: int, fps: float, size: tuple[int, int]) -> Tensor:
    """(frames, height, width, 3) uint8 from a video's beginning, chosen by time at `fps`.

    Raises:
        UserError: a clip that is too short, or cannot be read.
    """
    from musubi_tuner.media.probe import probe_video
    from musubi_tuner.media.video import choose_frames, read_frames, sampled_length

    info = probe_video(path)
    if (there := sampled_length(info, fps)) < frames:
        raise UserError(
            f"{where}: {flag} {path}: has {there} frames at {fps:g} fps, {frames} are needed. Give a longer clip, a smaller --f, "
            "or generate what is lacking (--vt)."
        )
    return read_frames(info, choose_frames(info, fps, 0, frames), *size)


def _audio(prompt: PreviewPrompt, encoders: ConditioningEncoders) -> tuple[Tensor | None, Tensor | None]:
    """Latents with the conditioning in its place, and which (T,) steps are conditioning."""
    inputs, steps = prompt.inputs, audio_steps(prompt)
    if inputs.audio is None:
        return None, None
    bounds = geometry.audio_positions(steps, 1)[0, 0]
    kept = torch.ones(steps, dtype=torch.bool) if inputs.audio_span is None else ~_within(bounds, inputs.audio_span)
    if not bool(kept.any()):
        raise UserError(f"{prompt.where}: --at leaves nothing of --a {inputs.audio} to start from.")
    end = float(bounds[int(kept.nonzero()[-1]), 1])
    samples = _read_audio(prompt, inputs.audio, beside_pictures=True)
    there = samples.shape[1] / geometry.AUDIO_SAMPLE_RATE
    if there + 1 / prompt.fps < min(end, prompt.seconds):
        raise UserError(
            f"{prompt.where}: --a {inputs.audio}: has {there:.2f} s, {end:.2f} s are needed. "
            "Give a longer sound, a smaller --f, or generate what is lacking (--at)."
        )
    # Cut or padded with silence to the sample's seconds, as caching does it, and to what `steps` latents need at least.
    wanted = round(prompt.seconds * geometry.AUDIO_SAMPLE_RATE)
    least = (steps - 1) * geometry.AUDIO_SAMPLE_RATE // geometry.AUDIO_LATENTS_PER_SECOND
    padding = max(wanted, least) - min(samples.shape[1], wanted)
    latents = encoders.audio(F.pad(samples[:, :wanted], (0, padding)))[:, :, :steps]
    return latents * kept[None, None, :, None], kept


def _read_audio(prompt: PreviewPrompt, path: Path, *, beside_pictures: bool) -> Tensor:
    """(2, samples) at 16 kHz of the sample's seconds, or of as many as the file has.

    Args:
        beside_pictures: counted from the first frame of a file that has pictures too; False: from the sound's own beginning.
    """
    from musubi_tuner.media.audio import read_audio, resample
    from musubi_tuner.media.probe import probe_audio

    info = probe_audio(path)
    start = info.origin if beside_pictures else info.start
    audio = read_audio(path, info, start, start + prompt.seconds)
    return resample(audio.samples, audio.rate, geometry.AUDIO_SAMPLE_RATE)


def _reference(prompt: PreviewPrompt, encoders: ConditioningEncoders) -> Reference | None:
    path, (factor, temporal) = prompt.inputs.reference, encoders.reference_factors
    if path is None:
        return None
    width, height = prompt.width // factor, prompt.height // factor
    if prompt.width % (factor * geometry.SPATIAL_SCALE) or prompt.height % (factor * geometry.SPATIAL_SCALE):
        raise UserError(
            f"{prompt.where}: --v: references of this dataset are {factor} times smaller (reference_downscale), "
            f"so --w and --h must be multiples of {factor * geometry.SPATIAL_SCALE}."
        )
    if path.suffix.lower() in _PICTURES:
        from musubi_tuner.media.picture import cover_and_crop, read_picture

        frames = cover_and_crop(read_picture(path), width, height)[None]
    else:
        if (prompt.frames - 1) % (geometry.TEMPORAL_SCALE * temporal):
            raise UserError(
                f"{prompt.where}: --v: a frame of this dataset's references stands for {temporal} (reference_temporal_scale), "
                f"so --f must be {geometry.TEMPORAL_SCALE * temporal}n+1."
            )
        frames = _read_clip(prompt.where, "--v", path, (prompt.frames - 1) // temporal + 1, prompt.fps / temporal, (width, height))
    latents = encoders.video(frames)
    return Reference(
        latents=latents,
        fps=torch.tensor([prompt.fps]),
        spatial_factor=factor,
        temporal_factor=temporal,
        strength=prompt.inputs.reference_strength,
        attention=_reference_attention(prompt, latents),
    )


def _reference_attention(prompt: PreviewPrompt, latents: Tensor) -> Tensor | None:
    """(1, M) float32, how strongly each token of the reference's (1, 128, F, h, w) latents and the sample attend to each other."""
    path, strength = prompt.inputs.reference_mask, prompt.inputs.reference_attention
    if path is None and strength == 1:
        return None
    cells = latents.shape[2:]
    if path is None:
        return torch.full((1, math.prod(cells)), strength)
    if path.suffix.lower() in _PICTURES:
        from musubi_tuner.media.picture import cover_and_crop, read_picture

        pixels = cover_and_crop(read_picture(path), prompt.width, prompt.height)[None].expand(prompt.frames, -1, -1, -1)
    else:
        pixels = _read_clip(prompt.where, "--vm", path, prompt.frames, prompt.fps, (prompt.width, prompt.height))
    return strength * mask_of_cells(pixels, (cells[0], cells[1], cells[2])).flatten()[None]


def mask_of_cells(frames: Tensor, cells: tuple[int, int, int]) -> Tensor:
    """(F, h, w) float32 0..1 brightness of (n, H, W, 3) uint8 frames, as ltx-pipelines 1.0.0 takes masks: means over a cell's pixels, and
    over the frames that its latent frame stands for, of which the first stands for one alone.

    Args:
        cells: F, of which each but the first stands for (n - 1) / (F - 1) frames, h and w.
    """
    count, height, width = cells
    gray = torch.stack([F.adaptive_avg_pool2d(frame.float().mean(dim=2)[None], (height, width))[0] for frame in frames]) / 255
    return torch.cat([gray[:1], gray[1:].unflatten(0, (count - 1, -1)).mean(dim=1)]) if count > 1 else gray[:1]


def _kept_video(prompt: PreviewPrompt) -> Tensor:
    """(F, h, w) bool: cells of the input clip that are kept.

    In the span what lies in the box is generated, without one everything. Around a crop there is nothing of the clip at any time.
    """
    inputs, cells = prompt.inputs, video_cells(prompt)
    if inputs.video is None:
        return torch.zeros(cells, dtype=torch.bool)
    inside = torch.ones(cells, dtype=torch.bool)
    if (area := inputs.box or inputs.crop) is not None:
        top, left, rows, columns = (value // geometry.SPATIAL_SCALE for value in (area.top, area.left, area.height, area.width))
        inside = torch.zeros(cells, dtype=torch.bool)
        inside[:, top : top + rows, left : left + columns] = True
    if inputs.video_span is None:
        return inside if inputs.box is None else ~inside
    within = _within(geometry.frame_bounds(cells[0]) / prompt.fps, inputs.video_span)[:, None, None]
    return inside & ~within if inputs.box is None else ~(within & inside)


def generated_spans(prompt: PreviewPrompt) -> list[str]:
    """What `--vt` and `--at` have generated, in words: their seconds reach outwards to whole latent frames and steps of the sound."""
    inputs, found = prompt.inputs, []
    if inputs.video is not None and inputs.video_span is not None:
        frames = geometry.frame_bounds(video_cells(prompt)[0])
        touched = frames[_within(frames / prompt.fps, inputs.video_span)]
        if len(touched):
            first, end = int(touched[0, 0]), min(int(touched[-1, 1]), prompt.frames)
            found.append(
                f"pictures from {first / prompt.fps:.2f} to {end / prompt.fps:.2f} s, frames {first} to {end - 1} "
                f"(whole latent frames, each {geometry.TEMPORAL_SCALE} of the clip but for its first)"
            )
    if inputs.audio is not None and inputs.audio_span is not None:
        steps = geometry.audio_positions(audio_steps(prompt), 1)[0, 0]
        touched = steps[_within(steps, inputs.audio_span)]
        if len(touched):
            found.append(f"sound from {float(touched[0, 0]):.2f} to {float(touched[-1, 1]):.2f} s")
    return found


def _within(bounds: Tensor, span: Span | None) -> Tensor:
    """(n,) bool of (n, 2) seconds [start, end): those that the span touches; all where there is none."""
    if span is None:
        return torch.ones(len(bounds), dtype=torch.bool)
    slack = 1e-6
    return (bounds[:, 0] < span.end - slack) & (bounds[:, 1] > span.start + slack)
