"""Everything that `ltxv2_train_network.py` can be told."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from musubi_tuner.config.conditioning import ConditioningOptions
from musubi_tuner.config.flags import flag
from musubi_tuner.config.losses import LossOptions, PreservationOptions, SoundOptions, check_loss_options, check_preservation
from musubi_tuner.config.memory import MemoryOptions, check_memory_options
from musubi_tuner.config.preview import PreviewOptions
from musubi_tuner.runtime.errors import UserError

TIMESTEP_FORMAT_HELP = (
    "--ltxv2_timestep_format is missing. It says how noise levels are written down and must be chosen, because other tools differ:\n"
    "  flowmatch_1_1000   t = 1 + 999 sigma (musubi-tuner's habit; take this one if unsure)\n"
    "  legacy_0_1000      t = 1000 sigma\n"
    "  sd3_0_1            t = sigma"
)

NETWORK_MODULE = "musubi_tuner.networks.lora_ltxv2"
NETWORK_MODULE_ALIASES = ("networks.lora_ltxv2", "networks.lora_ltx2")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Model files."""

    ltxv2_model: Path = flag("transformer file, full checkpoint, or folder of a split pack", aliases=("--ltx2_checkpoint", "--dit"))
    vae: Path | None = flag("video VAE for previews; default: --ltxv2_model", default=None)
    audio_vae: Path | None = flag("audio VAE and vocoder for previews; default: --vae", default=None)
    text_encoder: str | None = flag("encoder folder (or a hub id in the local cache), for prompts that were not cached", default=None)
    text_encoder_backend: Literal["gemma", "t5"] | None = flag("must agree with the cached captions", default=None)
    tokenizer: str | None = flag("tokenizer folder; default: --text_encoder", default=None)
    max_length: int | None = flag("cuts captions to this many tokens; must agree with the cache", default=None)
    ltxv2_backend: Literal["official"] = flag("implementation of the model", default="official")
    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeOptions:
    """What is trained."""

    dataset_config: Path = flag("dataset TOML")
    ltx_mode: Literal["video", "av", "audio"] | None = flag(
        "video alone, video with sound, or sound alone; default: video", default=None, aliases=("--ltx2_mode",)
    )
    ltxv2_audio_video: bool = flag("older way to say --ltx_mode av", default=False)
    ltxv2_timestep_format: Literal["flowmatch_1_1000", "legacy_0_1000", "sd3_0_1"] | None = flag(
        "how noise levels are written down; must be given", default=None
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkOptions:
    """Network."""

    network_module: str = flag("module that makes the network", default=NETWORK_MODULE)
    network_dim: int = flag("rank", default=32)
    network_alpha: float = flag("alpha; the update is scaled by alpha / rank", default=32.0)
    network_args: tuple[str, ...] = flag("key=value: type, preset, rank_dropout and so on (docs/networks.md)", default=())
    network_weights: Path | None = flag("LoRA file to start from, or a folder, whose newest one is taken", default=None)
    dim_from_weights: bool = flag("take type, modules and ranks from --network_weights", default=False)
    train_connectors: bool = flag("adapt the text connectors too; needs caches made with --text_cache_stage features", default=False)
    base_weights: tuple[Path, ...] = flag("LoRA files that are merged into the model before training", default=())
    base_weights_multiplier: tuple[float, ...] = flag("strength of each of --base_weights; default: 1", default=())

    @property
    def base_networks(self) -> tuple[tuple[Path, float], ...]:
        """Each of `base_weights` with its strength."""
        strengths = self.base_weights_multiplier or (1.0,) * len(self.base_weights)
        return tuple(zip(self.base_weights, strengths, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationOptions:
    """Optimization."""

    optimizer_type: str = flag(
        "AdamW, AdamW8bit, PagedAdamW8bit, Adafactor, Lion, Lion8bit, CAME, Prodigy, AdamWScheduleFree, ProdigyPlusScheduleFree, "
        "or a class by dotted name",
        default="AdamW",
    )
    optimizer_args: tuple[str, ...] = flag("key=value arguments of the optimizer", default=())
    learning_rate: float = flag("learning rate", default=1e-4)
    audio_learning_rate: float | None = flag("learning rate of the network's audio side; default: --learning_rate", default=None)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = flag(
        "schedule", default="constant"
    )
    lr_scheduler_type: str | None = flag("scheduler class by dotted name, in place of --lr_scheduler", default=None)
    lr_scheduler_args: tuple[str, ...] = flag("key=value: num_cycles, power, or arguments of the class", default=())
    lr_warmup_steps: float = flag("steps of linear warm-up, or a share of the run below 1", default=0.0)
    lr_decay_steps: float = flag("steps at the end over which a constant rate falls to 0, or a share below 1", default=0.0)
    max_train_steps: int = flag("optimizer steps", default=1600)
    max_train_epochs: int | None = flag("passes over the data; wins over --max_train_steps", default=None)
    gradient_accumulation_steps: int = flag("batches of one optimizer step", default=1)
    ema_decay: float = flag("save, preview and measure a moving average of the weights, such as 0.999; 0 = off", default=0.0)
    max_grad_norm: float = flag("gradients are clipped to this norm; 0 = not clipped", default=1.0)
    mixed_precision: Literal["no", "bf16"] | None = flag(
        "dtype of the frozen weights, no = float32; default: bf16 on a GPU, else what accelerate was launched with", default=None
    )
    seed: int = flag("seed of data order, noise and initial weights", default=42)
    max_data_loader_n_workers: int = flag("processes that read caches ahead", default=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingOptions:
    """Saving and resuming."""

    output_dir: Path = flag("folder of everything the run leaves", default=Path("output"))
    output_name: str = flag("name of the LoRA file", default="ltxv2_lora")
    save_every_n_steps: int | None = flag("save the LoRA every N steps", default=None)
    save_every_n_epochs: int | None = flag("save the LoRA every N epochs", default=None)
    save_last_n: int | None = flag("how many LoRAs of steps, and how many of epochs, are kept; default: all", default=None)
    save_precision: Literal["bfloat16", "float16", "float32"] = flag("dtype of the LoRA file", default="bfloat16")
    save_state: bool = flag("save the training state with every LoRA", default=False)
    save_last_n_states: int = flag("how many states are kept; older ones are removed", default=2)
    resume: Path | None = flag("state folder to go on from, exactly", default=None)
    autoresume: bool = flag("go on from the newest state of this --output_name in --output_dir, where there is one", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingOptions:
    """Logging and validation."""

    logging_dir: Path | None = flag("folder of tracker logs", default=None)
    log_with: Literal["tensorboard", "wandb", "all"] | None = flag("tracker, through accelerate", default=None)
    log_every_n_steps: int = flag("write losses every N steps", default=1)
    validate_every_n_steps: int | None = flag("held-out loss every N steps; default: ten times a run", default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """All sections."""

    mode: ModeOptions
    conditioning: ConditioningOptions
    model: ModelOptions
    network: NetworkOptions
    losses: LossOptions
    sound: SoundOptions
    preservation: PreservationOptions
    optimization: OptimizationOptions
    memory: MemoryOptions
    saving: SavingOptions
    preview: PreviewOptions
    logging: LoggingOptions

    @property
    def ltx_mode(self) -> str:
        """`video`, `av` or `audio`: the explicit flag wins over the older one."""
        return self.mode.ltx_mode or ("av" if self.mode.ltxv2_audio_video else "video")

    def flat(self) -> dict[str, Any]:
        """Every option by its name."""
        sections = (getattr(self, section.name) for section in fields(self))
        return {option.name: getattr(section, option.name) for section in sections for option in fields(section)}


def check_training_config(config: TrainingConfig) -> None:
    """Rules over several fields, and ranges.

    Raises:
        UserError: the first rule that is broken.
    """
    if config.mode.ltxv2_timestep_format is None:
        raise UserError(TIMESTEP_FORMAT_HELP)
    check_memory_options(config.memory)
    check_loss_options(config.losses, config.sound, config.ltx_mode)
    check_preservation(config.preservation, config.ltx_mode)
    if config.network.train_connectors and (config.losses.video_caption_dropout_rate or config.losses.audio_caption_dropout_rate):
        raise UserError("--train_connectors: captions are dropped for both streams together; give --caption_dropout_rate alone.")
    optimization, saving = config.optimization, config.saving
    at_least_one = {
        "--network_dim": config.network.network_dim,
        "--max_train_steps": optimization.max_train_steps,
        "--max_train_epochs": optimization.max_train_epochs,
        "--gradient_accumulation_steps": optimization.gradient_accumulation_steps,
        "--save_every_n_steps": saving.save_every_n_steps,
        "--save_every_n_epochs": saving.save_every_n_epochs,
        "--save_last_n": saving.save_last_n,
        "--save_last_n_states": saving.save_last_n_states,
        "--log_every_n_steps": config.logging.log_every_n_steps,
        "--validate_every_n_steps": config.logging.validate_every_n_steps,
    }
    not_negative = {
        "--learning_rate": optimization.learning_rate,
        "--audio_learning_rate": optimization.audio_learning_rate or 0.0,
        "--lr_warmup_steps": optimization.lr_warmup_steps,
        "--lr_decay_steps": optimization.lr_decay_steps,
        "--max_grad_norm": optimization.max_grad_norm,
        "--max_data_loader_n_workers": optimization.max_data_loader_n_workers,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be 1 at least.")
    for name, value in not_negative.items():
        if value < 0:
            raise UserError(f"{name} {value}: must not be negative.")
    if not 0 <= optimization.ema_decay < 1:
        raise UserError(f"--ema_decay {optimization.ema_decay:g}: a share of 0 or more and below 1, such as 0.999.")
    if config.network.network_alpha <= 0:
        raise UserError(f"--network_alpha {config.network.network_alpha}: must be positive; it scales the update by alpha / rank.")
    _check_network(config.network)
    if saving.autoresume and saving.resume is not None:
        raise UserError(f"--autoresume with --resume {saving.resume}: the first one chooses the state by itself; give one of them.")
    if any(sign in saving.output_name for sign in '/\\:*?"<>|'):
        raise UserError(f'--output_name {saving.output_name!r}: a file name without / \\ : * ? " < > |; the folder is --output_dir.')


def _check_network(network: NetworkOptions) -> None:
    if network.dim_from_weights and network.network_weights is None:
        raise UserError("--dim_from_weights: needs --network_weights, the file that type, modules and ranks are taken from.")
    given, wanted = len(network.base_weights_multiplier), len(network.base_weights)
    if given not in (0, wanted):
        raise UserError(f"--base_weights_multiplier: {given} number(s) for {wanted} file(s) of --base_weights; give one for each.")


def parse_pairs(pairs: tuple[str, ...], flag_name: str) -> dict[str, str]:
    """`key=value` arguments as a dict.

    Raises:
        UserError: an argument without `=`, or a key given twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"{flag_name} {pair!r}: must be key=value.")
        if key in values:
            raise UserError(f"{flag_name}: {key} is given twice.")
        values[key] = value
    return values
