"""Files that a prompt gives -> latents and conditions, before training starts. The encoders are loaded when first needed, once for all."""

from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.conditioning.conditions import Conditions, Reference, StreamConditions
from musubi_tuner.generation.given import TEXT_ALONE, Given, audio_steps, kept_sound, kept_video, keyframe_cell, video_cells
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.weights import Checkpoint
from musubi_tuner.prompts.sample_prompts import PreviewPrompt
from musubi_tuner.runtime.device import compute_dtype, free_memory
from musubi_tuner.runtime.errors import UserError

_STILL_FRAMES = geometry.TEMPORAL_SCALE + 1
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Encoders:
    """The VAEs' encoders, loaded at first use."""

    def __init__(
        self, vae: Checkpoint, audio_vae: Checkpoint, device: torch.device, *, reference_factors: tuple[int, int] = (1, 1)
    ) -> None:
        self.device = device
        self.reference_factors = reference_factors
        self._vae, self._audio_vae = vae, audio_vae
        self._video, self._sound = None, None

    def video(self, frames: Tensor) -> Tensor:
        """(F, H, W, 3) uint8 -> (1, 128, f, h, w) normalized latents on the CPU."""
        from musubi_tuner.ltxv2.autoencoders.video_vae import VideoVAE

        if self._video is None:
            self._video = VideoVAE.load(self._vae, device=self.device, dtype=compute_dtype(self.device), parts=("encoder",))
        pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return self._video.encode(pixels).float().cpu()

    def sound(self, samples: Tensor) -> Tensor:
        """(2, samples) at 16 kHz -> (1, 8, T, 16) normalized latents on the CPU."""
        from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE

        if self._sound is None:
            self._sound = AudioVAE.load(self._audio_vae, device=self.device, parts=("encoder",))
        return self._sound.encode(samples[None]).float().cpu()

    def close(self) -> None:
        self._video, self._sound = None, None
        free_memory(self.device)


def encode_given(prompt: PreviewPrompt, streams: tuple[str, ...], encoders: Encoders) -> Given:
    """Everything that a prompt gives.

    Raises:
        UserError: what the sample has no stream for, a file that is too short or cannot be read, or nothing left to be generated.
    """
    _check_streams(prompt, streams)
    video, clean = _video(prompt, encoders) if "video" in streams else (None, None)
    audio, heard = _sound(prompt, encoders) if "audio" in streams else (None, None)
    reference, reference_sound = _reference(prompt, encoders), _reference_sound(prompt, encoders)
    if all(one is None for one in (video, audio, reference, reference_sound)):
        return TEXT_ALONE
    given = [kept for kept in (clean, heard) if kept is not None]
    if len(given) == len(streams) and all(bool(kept.all()) for kept in given):
        raise UserError(f"{prompt.where}: everything is given and nothing is left to be generated. Give --vt, --box, --crop or --at.")
    return Given(
        video=video,
        audio=audio,
        conditions=Conditions(
            video=StreamConditions(clean=None if clean is None else clean.flatten()[None], reference=reference),
            audio=StreamConditions(clean=None if heard is None else heard[None], reference=reference_sound),
        ),
    )


def _check_streams(prompt: PreviewPrompt, streams: tuple[str, ...]) -> None:
    given = prompt.given
    pictures = {"--i": given.image, "--ei": given.end_image, "--k": given.keyframes, "--iv": given.video, "--v": given.reference}
    sounds = {"--a": given.sound, "--ra": given.reference_sound}
    for stream, flags in (("video", pictures), ("audio", sounds)):
        named = [flag for flag, value in flags.items() if value]
        if named and stream not in streams:
            what = "pictures" if stream == "video" else "sound (stills and --ltx_mode video have none)"
            raise UserError(f"{prompt.where}: {named[0]} is given, but this sample has no {what}.")


def _video(prompt: PreviewPrompt, encoders: Encoders) -> tuple[Tensor | None, Tensor | None]:
    """Latents with what is given in its place, and the (F, h, w) cells that are given."""
    given, cells = prompt.given, video_cells(prompt)
    pictures = dict(given.keyframes)
    if given.image is not None:
        pictures[0] = given.image
    if given.end_image is not None:
        pictures[prompt.frames - 1] = given.end_image
    if given.video is None and not pictures:
        return None, None
    latents = torch.zeros(1, geometry.LATENT_CHANNELS, *cells)
    clean = kept_video(prompt)
    if given.video is not None:
        _lay_clip(prompt, latents, clean, encoders)
    for frame, path in pictures.items():
        cell = keyframe_cell(frame)
        latents[:, :, cell] = _encode_still(path, prompt, encoders, first=cell == 0)
        clean[cell] = True
    return latents, clean


def _lay_clip(prompt: PreviewPrompt, latents: Tensor, kept: Tensor, encoders: Encoders) -> None:
    """The input clip into `latents`, as far as any of it is kept; a crop is filled by the whole picture."""
    given = prompt.given
    frames_kept = kept.flatten(1).any(1).nonzero()
    if not len(frames_kept):
        raise UserError(f"{prompt.where}: --vt leaves nothing of --iv {given.video} to start from.")
    needed = int(frames_kept[-1]) + 1
    place = given.crop
    width, height = (place.width, place.height) if place is not None else (prompt.width, prompt.height)
    top, left = (place.top, place.left) if place is not None else (0, 0)
    frames = read_clip(prompt.where, "--iv", given.video, (needed - 1) * geometry.TEMPORAL_SCALE + 1, prompt.fps, (width, height))
    rows, columns = (
        slice(start // geometry.SPATIAL_SCALE, (start + size) // geometry.SPATIAL_SCALE) for start, size in ((top, height), (left, width))
    )
    latents[:, :, :needed, rows, columns] = encoders.video(frames)
    latents *= kept


def _encode_still(path: Path, prompt: PreviewPrompt, encoders: Encoders, *, first: bool) -> Tensor:
    """(1, 128, h, w) of the first latent frame, which is one picture, or of a later one, which is the picture standing still."""
    from musubi_tuner.media.picture import cover_and_crop, read_picture

    picture = cover_and_crop(read_picture(path), prompt.width, prompt.height)[None]
    return encoders.video(picture if first else picture.expand(_STILL_FRAMES, -1, -1, -1))[:, :, -1]


def read_clip(where: str, flag: str, path: Path, frames: int, fps: float, size: tuple[int, int]) -> Tensor:
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


def _sound(prompt: PreviewPrompt, encoders: Encoders) -> tuple[Tensor | None, Tensor | None]:
    given, steps = prompt.given, audio_steps(prompt)
    if given.sound is None:
        return None, None
    kept = kept_sound(prompt)
    if not bool(kept.any()):
        raise UserError(f"{prompt.where}: --at leaves nothing of --a {given.sound} to start from.")
    end = float(geometry.audio_positions(steps, 1)[0, 0, int(kept.nonzero()[-1]), 1])
    samples = _read_sound(prompt, given.sound)
    there = samples.shape[1] / geometry.AUDIO_SAMPLE_RATE
    if there + 1 / prompt.fps < min(end, prompt.seconds):
        raise UserError(
            f"{prompt.where}: --a {given.sound}: has {there:.2f} s, {end:.2f} s are needed. "
            "Give a longer sound, a smaller --f, or generate what is lacking (--at)."
        )
    latents = encoders.sound(_fitted(samples, prompt.seconds, steps))[:, :, :steps]
    return latents * kept[None, None, :, None], kept


def _read_sound(prompt: PreviewPrompt, path: Path) -> Tensor:
    """(2, samples) at 16 kHz of the sample's seconds, or of as many as the file has."""
    from musubi_tuner.media.audio import read_audio, resample
    from musubi_tuner.media.probe import probe_sound

    info = probe_sound(path)
    heard = read_audio(path, info, info.start, info.start + prompt.seconds)
    return resample(heard.samples, heard.rate, geometry.AUDIO_SAMPLE_RATE)


def _fitted(samples: Tensor, seconds: float, steps: int) -> Tensor:
    """Cut or filled up with silence to `seconds`, as caching does it, and to what `steps` latents need at least."""
    wanted = round(seconds * geometry.AUDIO_SAMPLE_RATE)
    least = (steps - 1) * geometry.AUDIO_SAMPLE_RATE // geometry.AUDIO_LATENTS_PER_SECOND
    return torch.nn.functional.pad(samples[:, :wanted], (0, max(wanted, least) - min(samples.shape[1], wanted)))


def _reference(prompt: PreviewPrompt, encoders: Encoders) -> Reference | None:
    path, (factor, temporal) = prompt.given.reference, encoders.reference_factors
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
        frames = read_clip(prompt.where, "--v", path, (prompt.frames - 1) // temporal + 1, prompt.fps / temporal, (width, height))
    fps = torch.tensor([prompt.fps])
    return Reference(latents=encoders.video(frames), fps=fps, spatial_factor=factor, temporal_factor=temporal)


def _reference_sound(prompt: PreviewPrompt, encoders: Encoders) -> Reference | None:
    path = prompt.given.reference_sound
    if path is None:
        return None
    samples = _read_sound(prompt, path)
    return Reference(latents=encoders.sound(samples))
