"""All options of `ltxv2_train_network.py`."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.conditioning import ConditioningOptions
from musubi_tuner.config.flags import flag
from musubi_tuner.config.full_finetuning import check_full_finetuning
from musubi_tuner.config.losses import AudioOptions, LossOptions, PreservationOptions, check_losses
from musubi_tuner.config.model import Dtype, MemoryOptions, Mode, ModelOptions, ModeOptions, chosen_mode
from musubi_tuner.config.network import NetworkOptions
from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.config.publishing import TrainingHubOptions
from musubi_tuner.config.validation import AnyPath, Count, FileName, List, NotNegative, Seed, Wording, options
from musubi_tuner.runtime.errors import UserError

Steps = Annotated[int, Field(ge=1, lt=10**8)]
"""File names have eight digits for them."""


@options
class OptimizationOptions:
    """Optimization."""

    optimizer_type: str = flag(
        "AdamW, AdamW8bit, PagedAdamW8bit, Adafactor, Lion, Lion8bit, CAME, DAdaptAdam, Prodigy, AdamWScheduleFree, "
        "ProdigyPlusScheduleFree, or a class by dotted name",
        default="AdamW",
        common=True,
    )
    optimizer_args: Annotated[tuple[str, ...], List] = flag("key=value arguments of the optimizer", default=())
    learning_rate: NotNegative = flag("learning rate", default=1e-4, common=True)
    audio_learning_rate: NotNegative | None = flag("learning rate of the network's audio side; default: --learning_rate", default=None)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = flag(
        "schedule", default="constant", common=True
    )
    lr_scheduler_type: str | None = flag("scheduler class by dotted name, in place of --lr_scheduler", default=None)
    lr_scheduler_args: Annotated[tuple[str, ...], List] = flag("key=value: num_cycles, power, or arguments of the class", default=())
    lr_warmup_steps: NotNegative = flag("steps of linear warm-up, or a share of the run below 1", default=0.0, common=True)
    lr_decay_steps: NotNegative = flag("steps at the end over which a constant rate falls to 0, or a share below 1", default=0.0)
    max_train_steps: Steps = flag("optimizer steps", default=1600, common=True)
    max_train_epochs: Count | None = flag("passes over the data; wins over --max_train_steps", default=None, common=True)
    gradient_accumulation_steps: Count = flag("batches of one optimizer step", default=1, common=True)
    ema_decay: Annotated[float, Field(ge=0, lt=1), Wording("a share of 0 or more and below 1, such as 0.999")] = flag(
        "save, preview and measure a moving average of the weights, such as 0.999; 0 = off", default=0.0
    )
    max_grad_norm: NotNegative = flag("gradients are clipped to this norm; 0 = not clipped", default=1.0)
    fused_backward_pass: bool = flag(
        "of --full_finetune: update each weight as soon as its gradient is complete and free that; needs --max_grad_norm 0",
        default=False,
    )
    mixed_precision: Literal["no", "bf16"] | None = flag(
        "dtype of the model's weights, no = float32; default: bf16 on a GPU, else what accelerate was launched with", default=None
    )
    seed: Seed = flag("seed of data order, noise and initial weights", default=42, common=True)
    max_data_loader_n_workers: Annotated[int, Field(ge=0, le=256)] = flag("processes that read caches ahead", default=2)

    @model_validator(mode="after")
    def _check(self) -> "OptimizationOptions":
        if self.fused_backward_pass and self.max_grad_norm:
            raise UserError(
                f"--fused_backward_pass with --max_grad_norm {self.max_grad_norm:g}: the norm of all gradients is known only when the last "
                "one is, and the first weights have been updated by then. Give --max_grad_norm 0, with an optimizer that bounds its own "
                "steps (Adafactor does; AdamW nearly)."
            )
        if self.fused_backward_pass and self.gradient_accumulation_steps > 1:
            raise UserError(
                f"--fused_backward_pass with --gradient_accumulation_steps {self.gradient_accumulation_steps}: gradients that are used up "
                "at once cannot wait for the next batch. Give a larger batch_size in the dataset file, or leave one of the two out."
            )
        return self


@options
class SavingOptions:
    """Saving and resuming."""

    output_dir: AnyPath = flag("folder for everything the run writes", default=Path("output"), common=True)
    output_name: FileName = flag("name of the LoRA file", default="ltxv2_lora", common=True)
    save_every_n_steps: Count | None = flag("save the LoRA every N steps", default=None, common=True)
    save_every_n_epochs: Count | None = flag("save the LoRA every N epochs", default=None)
    save_last_n: Count | None = flag("how many LoRAs of steps, and how many of epochs, are kept; default: all", default=None)
    save_precision: Dtype = flag("dtype of the LoRA file", default="bfloat16")
    save_state: bool = flag("save the training state with every LoRA", default=False, common=True)
    save_last_n_states: Count = flag("how many states are kept; older ones are removed", default=2)
    resume: AnyPath | None = flag("state folder to resume from, exactly", default=None)
    autoresume: bool = flag(
        "go on from the newest state of this --output_name in --output_dir, where there is one", default=False, common=True
    )
    overwrite: bool = flag(
        "start anew where an earlier run of this --output_name has left LoRAs or states, and remove these and its previews", default=False
    )

    @model_validator(mode="after")
    def _check(self) -> "SavingOptions":
        if self.overwrite and (self.autoresume or self.resume is not None):
            other = "--autoresume" if self.autoresume else f"--resume {self.resume}"
            raise UserError(f"--overwrite with {other}: the first one starts anew, the other goes on; give one of them.")
        return self


@options
class LoggingOptions:
    """Logging and validation."""

    logging_dir: AnyPath | None = flag("folder of tracker logs", default=None)
    log_with: Literal["tensorboard", "wandb", "all"] | None = flag("tracker, through accelerate", default=None)
    log_every_n_steps: Count = flag("write losses every N steps", default=1)
    validate_every_n_steps: Count | None = flag("held-out loss every N steps; default: ten times a run", default=None)


@options
class TrainingConfig:
    """All sections."""

    mode: ModeOptions
    conditioning: ConditioningOptions
    model: ModelOptions
    network: NetworkOptions
    losses: LossOptions
    audio: AudioOptions
    preservation: PreservationOptions
    optimization: OptimizationOptions
    memory: MemoryOptions
    saving: SavingOptions
    preview: PreviewOptions
    logging: LoggingOptions
    hub: TrainingHubOptions

    @property
    def ltx_mode(self) -> Mode:
        """`video`, `av` or `audio`."""
        return chosen_mode(self.mode)

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        sections = (getattr(self, section.name) for section in fields(self))
        return {option.name: getattr(section, option.name) for section in sections for option in fields(section)}

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        check_losses(self.losses, self.audio, self.preservation, self.ltx_mode)
        if self.network.full_finetune:
            check_full_finetuning(self.network, self.preservation, self.memory, within_backward=self.optimization.fused_backward_pass)
        elif self.optimization.fused_backward_pass:
            raise UserError("--fused_backward_pass: is of --full_finetune. The gradients of a network are small; leave it out.")
        if self.network.train_connectors and (self.losses.video_caption_dropout_rate or self.losses.audio_caption_dropout_rate):
            raise UserError("--train_connectors: captions are dropped for both streams together; give --caption_dropout_rate alone.")
        return self
