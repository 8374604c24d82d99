"""What is learned from a prediction: noise levels, losses, sound, dropped captions."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import List, NotNegative, Positive, Share, Text, Whole, Wording, options
from musubi_tuner.runtime.errors import UserError

NoiseLevel = Annotated[float, Field(ge=0, le=1000)]


NoMinSnr = Annotated[
    float,
    Field(ge=0, le=0),
    Wording(
        "left out: min-SNR weights by the signal-to-noise ratio of a diffusion schedule, which flow matching does not have; "
        "give --weighting_scheme"
    ),
]


@options
class LossOptions:
    """Noise levels and losses."""

    timestep_sampling: Literal["shifted_logit_normal", "uniform", "logit_normal", "stratified"] = flag(
        "how noise levels are drawn (docs/explanation/noise_levels.md)", default="shifted_logit_normal"
    )
    timestep_args: Annotated[tuple[str, ...], List] = flag("key=value: shift, std, mean, uniform_prob, eps", default=())
    min_timestep: NoiseLevel = flag("lowest noise level, of 1000", default=0.0)
    max_timestep: NoiseLevel = flag("highest noise level, of 1000", default=1000.0)
    independent_audio_timestep: bool = flag("draw the sound's noise level separately from the video's", default=True)
    av_timestep_rule: Literal["official", "cross", "own"] = flag("stream whose sigma drives the cross attention", default="official")
    loss_type: Literal["mse", "mae", "huber"] = flag("error of the predicted velocity", default="mse")
    huber_delta: Positive = flag("error at which Huber loss becomes linear", default=1.0)
    weighting_scheme: Literal["none", "sigma_sqrt", "cosmap"] = flag("loss weight by noise level, averaging 1", default="none")
    min_snr_gamma: NoMinSnr = flag("refused unless 0: flow matching has no such quantity", default=0.0)
    noise_offset: NotNegative = flag("strength of an offset of the video's noise, the same for all cells of a channel", default=0.0)
    caption_dropout_rate: Share = flag("share of items whose caption is replaced by the empty one", default=0.0)
    video_caption_dropout_rate: Share = flag("the same for the video's context alone", default=0.0)
    audio_caption_dropout_rate: Share = flag("the same for the sound's context alone", default=0.0)

    @property
    def drops_captions(self) -> bool:
        return bool(self.caption_dropout_rate or self.video_caption_dropout_rate or self.audio_caption_dropout_rate)

    @model_validator(mode="after")
    def _check(self) -> "LossOptions":
        if self.min_timestep >= self.max_timestep:
            raise UserError(f"--min_timestep {self.min_timestep:g} --max_timestep {self.max_timestep:g}: must be 0 <= min < max <= 1000.")
        return self


@options
class AudioOptions:
    """Streams and sound."""

    video_loss_weight: NotNegative = flag("weight of the video loss; a dataset's own weight wins", default=1.0)
    audio_loss_weight: NotNegative = flag("weight of the audio loss; a dataset's own weight wins", default=1.0)
    audio_balance: Literal["off", "ema"] = flag(
        "ema keeps the audio loss at a third of the video loss; then its weight is not used", default="off"
    )
    audio_supervision_mode: Literal["off", "warn", "error"] = flag("what happens where too little sound is supervised", default="off")
    audio_supervision_min_ratio: Share = flag("share of the items that should have sound", default=0.9)
    audio_supervision_warmup_steps: Whole = flag("steps before the share is looked at", default=50)


@options
class PreservationOptions:
    """Keeping what the base model knows."""

    dop_prompt: Text | None = flag(
        "prompt, such as the class of what is trained, on which the adapter is held to the base model; '' = the empty one",
        default=None,
        may_be_empty=True,
    )
    dop_weight: NotNegative = flag("weight of that loss", default=1.0)
    audio_dop_weight: NotNegative = flag("weight of holding the sound of items without any to the base model's; 0 = off", default=0.0)


def check_losses(losses: LossOptions, sound: AudioOptions, preservation: PreservationOptions, mode: str) -> None:
    """What a mode without one of the streams cannot have.

    Raises:
        UserError: names flag, value and mode.
    """
    lacking = {"video": "audio", "audio": "video"}.get(mode)
    for stream, name in (("video", "video_caption_dropout_rate"), ("video", "noise_offset"), ("audio", "audio_caption_dropout_rate")):
        if stream == lacking and (value := getattr(losses, name)):
            raise UserError(f"--{name} {value:g}: is of the {stream} stream, which --ltx_mode {mode} has not. Leave it out.")
    if sound.audio_balance != "off" and lacking:
        raise UserError(
            f"--audio_balance {sound.audio_balance}: balances sound against video, and --ltx_mode {mode} has one of them. Give av."
        )
    if sound.audio_supervision_mode != "off" and mode == "video":
        raise UserError(f"--audio_supervision_mode {sound.audio_supervision_mode}: --ltx_mode video has no sound. Give av or audio.")
    if preservation.audio_dop_weight and lacking:
        raise UserError(
            f"--audio_dop_weight {preservation.audio_dop_weight:g}: keeps the sound that goes with pictures; --ltx_mode {mode} trains one "
            "of them. Give av, or leave it out."
        )
