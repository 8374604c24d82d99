"""What one prompt asks for: a text, a size, a seed, and the files that its sample is conditioned on."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds [start, end) of the sample."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Pixels of the sample, multiples of 32."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningInputs:
    """Files of one prompt that its sample starts from or is shown."""

    image: Path | None = None
    """First frame, in its place."""
    image_strength: float = 1.0
    """How far it is kept: 1 = as it is, 0 = not at all."""
    strengths: tuple[tuple[int, float], ...] = ()
    """(frame, strength) of keyframes that are not kept as they are."""
    strengths_beside: tuple[tuple[int, float], ...] = ()
    """(frame, strength) of pictures beside the sample, where the keyframe in place of the same frame has another strength."""
    reference_strength: float = 1.0
    end_image: Path | None = None
    """Last frame, beside the sample."""
    keyframes: tuple[tuple[int, Path], ...] = ()
    """(frame, picture) beside the sample"""
    keyframes_in_place: tuple[tuple[int, Path], ...] = ()
    """(frame, picture) in place of the latent frames that they lie in"""
    video: Path | None = None
    """A clip that is kept but for what `video_span`, `box` and `crop` leave to be generated; all of it where there are none."""
    video_span: Span | None = None
    box: Rectangle | None = None
    """What is generated."""
    crop: Rectangle | None = None
    """What is kept; the clip fills it."""
    audio: Path | None = None
    """Sound that is kept but for `audio_span`."""
    audio_span: Span | None = None
    reference: Path | None = None
    """Clip or picture that is shown beside the sample (IC-LoRA)."""
    reference_attention: float = 1.0
    """How strongly the sample's pictures and the reference attend to each other: 1 = fully, 0 = not at all."""
    reference_mask: Path | None = None
    """Clip or picture whose brightness, 0 to 1, multiplies that place by place."""
    reference_audio: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewPrompt:
    """One sample to make."""

    index: int
    """Place in the file, from 0; part of the file names."""
    prompt: str
    negative: str
    width: int
    """pixels, a multiple of 32"""
    height: int
    frames: int
    """8n+1; 1 makes a still"""
    fps: float
    seed: int
    steps: int | None
    video_cfg: float | None
    """None = by the command line, else by the model's version."""
    audio_cfg: float | None
    where: str
    """File and line or entry, for messages."""
    inputs: ConditioningInputs = ConditioningInputs()
    names_frames: bool = True
    """`frames` is the prompt's own or its default; False = the most that it may have, until a duration is predicted."""
    written: str = ""
    """What the user wrote, where `prompt` was written out of it by a language model."""

    @property
    def seconds(self) -> float:
        return self.frames / self.fps
