"""What is learned from a prediction: noise levels, losses, sound, dropped captions."""

from dataclasses import dataclass
from typing import Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Noise levels and losses."""

    timestep_sampling: Literal["shifted_logit_normal", "uniform", "logit_normal", "stratified"] = flag(
        "how noise levels are drawn (docs/losses.md)", default="shifted_logit_normal"
    )
    timestep_args: tuple[str, ...] = flag("key=value: shift, std, mean, uniform_prob, eps", default=())
    min_timestep: float = flag("lowest noise level, of 1000", default=0.0)
    max_timestep: float = flag("highest noise level, of 1000", default=1000.0)
    independent_audio_timestep: bool = flag("draw the sound's noise level apart from the video's", default=True)
    av_timestep_rule: Literal["official", "cross", "own"] = flag("who drives the cross attention between the streams", default="official")
    loss_type: Literal["mse", "mae", "huber"] = flag("error of the predicted velocity", default="mse")
    huber_delta: float = flag("where huber turns from squares to lines", default=1.0)
    weighting_scheme: Literal["none", "sigma_sqrt", "cosmap"] = flag("weight of the loss by noise level, 1 in the mean", default="none")
    min_snr_gamma: float = flag("refused unless 0: flow matching has no such quantity", default=0.0)
    noise_offset: float = flag("strength of an offset of the video's noise, the same for all cells of a channel", default=0.0)
    caption_dropout_rate: float = flag("share of items whose caption is replaced by the empty one", default=0.0)
    video_caption_dropout_rate: float = flag("the same for the video's context alone", default=0.0)
    audio_caption_dropout_rate: float = flag("the same for the sound's context alone", default=0.0)

    @property
    def drops_captions(self) -> bool:
        return bool(self.caption_dropout_rate or self.video_caption_dropout_rate or self.audio_caption_dropout_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundOptions:
    """Streams and sound."""

    video_loss_weight: float = flag("weight of the video loss; a dataset's own weight wins", default=1.0)
    audio_loss_weight: float = flag("weight of the audio loss; a dataset's own weight wins", default=1.0)
    audio_balance: Literal["off", "ema"] = flag(
        "ema keeps the audio loss at a third of the video loss; then its weight is not used", default="off"
    )
    audio_supervision_mode: Literal["off", "warn", "error"] = flag("what happens where too little sound is supervised", default="off")
    audio_supervision_min_ratio: float = flag("share of the items that should have sound", default=0.9)
    audio_supervision_warmup_steps: int = flag("steps before the share is looked at", default=50)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreservationOptions:
    """Keeping what the base model knows."""

    dop_prompt: str | None = flag(
        "prompt, such as the class of what is trained, on which the adapter is held to the base model; '' = the empty one", default=None
    )
    dop_weight: float = flag("weight of that loss", default=1.0)
    audio_dop_weight: float = flag("weight of holding the sound of items without any to the base model's; 0 = off", default=0.0)


def check_preservation(preservation: PreservationOptions, mode: str) -> None:
    """
    Raises:
        UserError: a weight that is negative, or a mode that has no sound.
    """
    for name, value in (("--dop_weight", preservation.dop_weight), ("--audio_dop_weight", preservation.audio_dop_weight)):
        if value < 0:
            raise UserError(f"{name} {value:g}: must not be negative.")
    if preservation.audio_dop_weight and mode != "av":
        raise UserError(
            f"--audio_dop_weight {preservation.audio_dop_weight:g}: keeps the sound that goes with pictures; --ltx_mode {mode} trains one "
            "of them. Give av, or leave it out."
        )


def check_loss_options(losses: LossOptions, sound: SoundOptions, mode: str) -> None:
    """Rules over several fields, and ranges.

    Raises:
        UserError: the first rule that is broken.
    """
    if losses.min_snr_gamma:
        raise UserError(
            f"--min_snr_gamma {losses.min_snr_gamma:g}: min-SNR weights by the signal-to-noise ratio of a diffusion schedule, which flow "
            "matching has not. Leave it out, or give --weighting_scheme."
        )
    if not 0 <= losses.min_timestep < losses.max_timestep <= 1000:
        raise UserError(f"--min_timestep {losses.min_timestep:g} --max_timestep {losses.max_timestep:g}: must be 0 <= min < max <= 1000.")
    if losses.huber_delta <= 0:
        raise UserError(f"--huber_delta {losses.huber_delta:g}: must be positive.")
    shares = {
        "--caption_dropout_rate": losses.caption_dropout_rate,
        "--video_caption_dropout_rate": losses.video_caption_dropout_rate,
        "--audio_caption_dropout_rate": losses.audio_caption_dropout_rate,
        "--audio_supervision_min_ratio": sound.audio_supervision_min_ratio,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} {value:g}: a share between 0 and 1.")
    for name, value in (
        ("--video_loss_weight", sound.video_loss_weight),
        ("--audio_loss_weight", sound.audio_loss_weight),
        ("--noise_offset", losses.noise_offset),
        ("--audio_supervision_warmup_steps", sound.audio_supervision_warmup_steps),
    ):
        if value < 0:
            raise UserError(f"{name} {value:g}: must not be negative.")
    without = {"video": "audio", "audio": "video"}.get(mode)
    of_stream = {
        "--video_caption_dropout_rate": ("video", losses.video_caption_dropout_rate),
        "--noise_offset": ("video", losses.noise_offset),
        "--audio_caption_dropout_rate": ("audio", losses.audio_caption_dropout_rate),
    }
    for name, (stream, value) in of_stream.items():
        if value and stream == without:
            raise UserError(f"{name} {value:g}: is of the {stream} stream, which --ltx_mode {mode} has not. Leave it out.")
    if sound.audio_balance != "off" and mode != "av":
        raise UserError(
            f"--audio_balance {sound.audio_balance}: balances sound against video, and --ltx_mode {mode} has one of them. Give av."
        )
    if sound.audio_supervision_mode != "off" and mode == "video":
        raise UserError(f"--audio_supervision_mode {sound.audio_supervision_mode}: --ltx_mode video has no sound. Give av or audio.")
