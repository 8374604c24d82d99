"""Names that notes for musubi-tuner and its LTX-2 forks use, and what they are here: the one table of them.

A name is taken as ours where it means the same; it is ignored, with a line in the log, where nothing here needs it and the result does
not depend on it; it is an error with the right name in every other case. docs/reference/musubi_names.md is written from this file.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


def _each(value: Any, names: str) -> dict[str, Any]:
    """One value for several names, which blanks part."""
    return dict.fromkeys(names.split(), value)


LATENTS, SOUND, TEXT, TRAINING = (
    "ltxv2_cache_latents.py",
    "ltxv2_cache_audio_latents.py",
    "ltxv2_cache_text_encoder_outputs.py",
    "ltxv2_train_network.py",
)

ALIASES: Mapping[str, tuple[str, ...]] = {
    "ltxv2_model": ("ltx2_checkpoint", "dit"),
    "ltx_mode": ("ltx2_mode",),
    "text_encoder": ("gemma_root",),
    "text_dtype": ("text_encoder_dtype",),
    "attn_mode": ("attention_backend",),
    "first_frame_conditioning_p": ("ltx2_first_frame_conditioning_p",),
    "audio_learning_rate": ("audio_lr",),
    "audio_loss_weight": ("audio_loss_multiplier",),
    "audio_supervision_min_ratio": ("strict_audio_min_supervised_ratio",),
    "audio_supervision_warmup_steps": ("strict_audio_warmup_steps",),
    "sample_width": ("width",),
    "sample_height": ("height",),
    "sample_frames": ("sample_num_frames", "frame_count"),
    "sample_fps": ("frame_rate",),
    "sample_prompts": ("from_file",),
}
"""Our flag -> names that mean the same, in every program that has the flag, on the command line and in `--config_file`."""

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32"}
VALUES: Mapping[str, Mapping[str, str]] = {
    "save_precision": _DTYPES,
    "vae_dtype": _DTYPES,
    "text_dtype": _DTYPES,
    "ltx_mode": {"v": "video", "a": "audio", "va": "av"},
    "loss_type": {"l2": "mse", "l1": "mae"},
    "timestep_sampling": {"sigmoid": "logit_normal"},
    "sample_sampling_preset": {"defaults": "auto"},
}
"""Our flag -> words that mean one of its choices."""
PERCENTAGES = ("lr_warmup_steps", "lr_decay_steps")
"""Flags that take a share of the run as `10%` too."""

OTHER_VALUES: Mapping[str, Mapping[str, str]] = {
    "timestep_sampling": {
        "shift": "give logit_normal with --timestep_args mean=LN, where LN is the natural logarithm of the shift (shift 1: 0; 3: 1.0986)",
        "sigma": "shifted_logit_normal is how LTX-2 itself was trained; uniform draws all levels alike",
        "flux_shift": "a shift by the number of tokens is what shifted_logit_normal does",
        "qwen_shift": "a shift by the number of tokens is what shifted_logit_normal does",
    },
    "weighting_scheme": {
        "logit_normal": "it says how noise levels are drawn: give --timestep_sampling logit_normal, and no --weighting_scheme",
        "mode": "it says how noise levels are drawn: choose a --timestep_sampling, and no --weighting_scheme",
    },
    "loss_type": {"smooth_l1": "give huber, which is smooth_l1 times its --huber_delta"},
    "lr_scheduler": {
        "rex": "give cosine or polynomial, or a class of your own by --lr_scheduler_type MODULE.CLASS",
        "cosine_with_min_lr": "give cosine, or --lr_scheduler_type torch.optim.lr_scheduler.CosineAnnealingLR with its arguments",
        "warmup_stable_decay": "give constant with --lr_warmup_steps and --lr_decay_steps",
        "adafactor": "give constant: --optimizer_type Adafactor is torch's here, and takes --learning_rate as it is",
    },
    "mixed_precision": {"fp16": "LTX-2 is trained in bf16; give bf16, or no for float32"},
    "sample_sampling_preset": {
        **_each("auto takes steps and guidance by the version of the model's file", "legacy ltx20 ltx23 ltx23_hq"),
        "distilled_two_stage": "give distilled, which is its first stage",
    },
    "audio_balance": {"ema_mag": "give ema", "none": "give off"},
}
"""Our flag -> words that none of its choices means, and what to give."""


class Ignored(NamedTuple):
    """A flag that is read over."""

    values: int
    """How many values may follow it at most."""
    why: str


_KERNEL = "attention kernels are measured (--attn_mode chooses one)"
_COMPILE = "blocks are compiled as they are run (--no-compile switches it off)"
_MEMORY = "a plan decides it by the memory that is free"
_TRACKERS = "runs are named by --output_name"
_FILE = "what the file is called follows from --output_name"
_GROUPS = "processes are set up by accelerate"

IGNORED: Mapping[str, Ignored] = {
    **_each(Ignored(0, _KERNEL), "sdpa xformers flash_attn flash3 sage_attn split_attn sample_disable_flash_attn"),
    **_each(Ignored(1, _KERNEL), "split_attn_target split_attn_mode split_attn_chunk_size"),
    **_each(Ignored(1, _MEMORY), "ffn_chunk_target ffn_chunk_size"),
    **_each(
        Ignored(0, _COMPILE), "compile_fullgraph compile_auto_cache_size_limit compile_fallback_to_eager dynamo_fullgraph dynamo_dynamic"
    ),
    **_each(
        Ignored(1, _COMPILE),
        "compile_backend compile_mode compile_dynamic compile_cache_size_limit dynamo_backend dynamo_mode inductor_config",
    ),
    **_each(Ignored(0, "torch's settings are ours to choose"), "cuda_allow_tf32 cuda_cudnn_benchmark disable_cudnn_backend"),
    **_each(
        Ignored(0, _MEMORY),
        "use_pinned_memory_for_block_swap block_swap_h2d_only gradient_checkpointing_cpu_offload blockwise_checkpointing "
        "img_in_txt_in_offloading ltx2_low_ram_load cpu_staged_checkpoint_loading disable_numpy_memmap sample_with_offloading "
        "sample_tiled_vae vae_tiling",
    ),
    **_each(
        Ignored(1, _MEMORY),
        "block_swap_ring_size block_swap_granularity blocks_to_checkpoint quantize_device vae_chunk_size vae_spatial_tile_overlap "
        "vae_temporal_tile_overlap sample_vae_tile_size sample_vae_tile_overlap sample_vae_temporal_tile_size "
        "sample_vae_temporal_tile_overlap",
    ),
    **_each(Ignored(0, "workers live as long as the run"), "persistent_data_loader_workers dataloader_pin_memory"),
    **_each(Ignored(0, _GROUPS), "ddp_gradient_as_bucket_view ddp_static_graph"),
    "ddp_timeout": Ignored(1, _GROUPS),
    **_each(Ignored(1, "the version is read from the model's file"), "ltx_version ltx_version_check_mode"),
    "async_upload": Ignored(0, "uploads never hold up training"),
    **_each(Ignored(1, _TRACKERS), "log_prefix log_tracker_name wandb_run_name"),
    "log_config": Ignored(0, "settings are always handed to the trackers"),
    **_each(Ignored(1, _FILE), "metadata_title metadata_reso metadata_arch"),
    "use_precached_sample_prompts": Ignored(0, "prompts that are cached are always used"),
    "precache_sample_prompts": Ignored(0, f"--sample_prompts FILE of {TEXT} caches them"),
    "sample_prompts_cache": Ignored(1, "cached prompts lie in the first dataset's cache folder"),
    "separate_audio_buckets": Ignored(0, "batches are made of clips that fit together, with sound or without"),
    "preserve_audio_timing": Ignored(0, "sound is never stretched"),
    "atomic_cache_writes": Ignored(0, "files are always written whole"),
    "no_convert_to_comfy": Ignored(0, "the one file is what ComfyUI and diffusers load"),
}
"""Flags that nothing here needs; the result does not depend on them."""

ELSEWHERE: Mapping[str, str] = {
    "gemma_load_in_8bit": TEXT,
    "gemma_load_in_4bit": TEXT,
    "text_dtype": TEXT,
    "text_encoder_dtype": TEXT,
    "text_cache_stage": TEXT,
    "vae_dtype": LATENTS,
    "vae_spatial_tile_size": LATENTS,
    "vae_temporal_tile_size": LATENTS,
    "sample_prompts": f"{TEXT} and {TRAINING}",
    "dop_prompt": f"{TEXT} and {TRAINING}",
    "audio_vae": f"{SOUND} and {TRAINING}",
    "text_encoder": f"{TEXT} and {TRAINING}",
    "gemma_root": f"{TEXT} and {TRAINING}",
    "skip_existing": "the caching programs",
    "keep_cache": "the caching programs",
    "dry_run": "the caching programs",
    "num_workers": "the caching programs; here it is --max_data_loader_n_workers",
    "batch_size": "the dataset TOML (batch_size) and, for encoding, to the caching programs",
    **_each(TRAINING, "max_train_steps learning_rate network_dim mixed_precision fp8_base fp8_scaled"),
}
"""Flags of some programs -> those they belong to, for a program that lacks them."""

_RESAMPLED = "give it in --timestep_args"
_INSTEAD_KINDS = "give --weight_format"

INSTEAD: Mapping[str, str] = {
    # saving
    "save_last_n_epochs": "use --save_last_n N, which keeps N LoRAs of epochs, and N of steps",
    "save_last_n_steps": "counts steps; use --save_last_n N, which counts files",
    "save_last_n_epochs_state": "use --save_last_n_states N, which counts states",
    "save_last_n_steps_state": "counts steps; use --save_last_n_states N, which counts states",
    "save_state_on_train_end": "use --save_state, which saves one with every LoRA, the last one too",
    "no_metadata": "metadata are always written; the file's tensors do not depend on them",
    **_each(
        "such metadata are not written; add them to the finished file, or leave the flag out",
        "metadata_author metadata_description metadata_license metadata_tags training_comment",
    ),
    "resume_from_huggingface": "fetch the state's folder with the hub's own program, hf download, and give --resume",
    "wandb_api_key": "log in with 'wandb login', or set WANDB_API_KEY",
    "log_tracker_config": "trackers are set up by their own environment variables and files",
    "log_grad_metrics": "grad_norm is always logged; leave it out",
    # what is trained
    "lora_target_preset": "use --network_args preset=: t2v is attention, v2v and av_ic are attention_ff, audio is audio; video_sa is "
    "include_patterns=attn1\\.to_ with exclude_patterns=audio_,gate",
    "network_dropout": "use --network_args neuron_dropout=P (of an adapter's inputs) or rank_dropout=P",
    "audio_dim": "use --network_args audio_dim=N",
    "audio_alpha": "use --network_args audio_alpha=X",
    "lycoris_config": "use --network_args type=lokr or type=loha, with preset= or include_patterns=",
    "scale_weight_norms": "is not here; a lower --network_alpha or --learning_rate holds the weights down",
    "loftq_init": "is not here; the adapter starts at zero",
    **_each(
        "an adapter's own weights are float32, and --full_finetune's of the dtype of --mixed_precision; leave it out", "full_fp16 full_bf16"
    ),
    **_each("use --ema_decay 0.999, which switches it on", "use_ema save_ema_only"),
    "ic_lora_strategy": "use --conditioning_config conditioning_recipes/reference_video.toml",
    "ltx2_conditioning_config": "use --conditioning_config, whose recipes have a form of their own (docs/reference/recipes.md)",
    "reference_downscale": "is a key of the dataset TOML: reference_downscale = 2",
    "reference_temporal_scale": "is a key of the dataset TOML: reference_temporal_scale = 2",
    "reference_frames": "references are as long as their clips; reference_temporal_scale of the dataset TOML makes them coarser",
    # losses and noise levels
    "blank_preservation": 'use --dop_prompt "", which holds the adapter to the base model on the empty prompt',
    "dop": 'use --dop_prompt "CLASS", such as "a woman"',
    "dop_class_prompt": 'use --dop_prompt "CLASS"',
    **_each('use --dop_prompt "CLASS" and --dop_weight X', "dop_args blank_preservation_args"),
    "prior_divergence": "is not here; --dop_prompt holds the adapter to the base model",
    "audio_dop": "use --audio_dop_weight 0.5",
    "audio_dop_args": "use --audio_dop_weight X for multiplier=X",
    **_each(
        "trains towards silence; --audio_dop_weight X holds the sound to the base model's",
        "audio_silence_regularizer audio_silence_regularizer_weight",
    ),
    "strict_audio_mode": "use --audio_supervision_mode error",
    "audio_loss_balance_mode": "use --audio_balance ema (their ema_mag); the others are not here",
    "audio_loss_balance_target_ratio": "--audio_balance ema keeps the audio loss at 0.33 of the video loss; leave it out",
    "num_timestep_buckets": "use --timestep_sampling stratified",
    "show_timesteps": "is not here; docs/explanation/noise_levels.md shows how levels are spread",
    "preserve_distribution_shape": "--min_timestep and --max_timestep scale the draws into their range; there is no other way here",
    "sigmoid_scale": f"{_RESAMPLED}: std=X with --timestep_sampling logit_normal",
    "logit_mean": f"{_RESAMPLED}: mean=X with --timestep_sampling logit_normal",
    "logit_std": f"{_RESAMPLED}: std=X with --timestep_sampling logit_normal",
    "mode_scale": "is not here; choose a --timestep_sampling",
    "shifted_logit_shift": f"{_RESAMPLED}: shift=X",
    "shifted_logit_eps": f"{_RESAMPLED}: eps=X",
    "shifted_logit_uniform_prob": f"{_RESAMPLED}: uniform_prob=X",
    "shifted_logit_mode": "shifted_logit_normal is their 'stretched'; their 'legacy' is not here",
    "lr_args": "one rate for the audio side is --audio_learning_rate; other groups are not here",
    "lr_scheduler_num_cycles": "use --lr_scheduler_args num_cycles=N",
    "lr_scheduler_power": "use --lr_scheduler_args power=X",
    "lr_scheduler_timescale": "use --lr_scheduler_type CLASS with --lr_scheduler_args",
    "lr_scheduler_min_lr_ratio": "schedules fall to 0; use --lr_scheduler_type CLASS with --lr_scheduler_args for another end",
    # memory
    "fp8_llm": f"use --gemma_load_in_8bit of {TEXT}",
    "fp8_keep_blocks": "the plan chooses blocks that stay whole; leave it out",
    "nf4_base": f"{_INSTEAD_KINDS} nf4",
    "int8_base": f"{_INSTEAD_KINDS} int8, which quantizes any file",
    **_each(f"{_INSTEAD_KINDS} fp8, int8 or nf4, the formats of this program", "fp8_w8a8 int8_convrot_base int4_convrot_base"),
    # previews
    "flow_shift": "previews: use --discrete_flow_shift X; training: see --timestep_args",
    "guidance_scale": "use --video_cfg_scale X and --audio_cfg_scale X, or --l X in the prompt file",
    "video_rescale_scale": "use --rescale_scale, for both streams",
    "video_modality_scale": "use --modality_scale, for both streams",
    "stg_mode": "--stg_scale is of both streams; leave it out",
    "sample_disable_audio": "previews of --ltx_mode av have sound; train with --ltx_mode video for none",
    "sample_audio_only": "--ltx_mode audio previews sound alone",
    "sample_merge_audio": "previews always hold their sound; leave it out",
    "sample_include_reference": "give --v FILE in the prompt file",
    "sample_two_stage": "previews have one stage; ltxv2_generate_video.py --pipeline two_stage has two",
    # caching
    "vae_spatial_tile_sample_min_size": f"use --vae_spatial_tile_size N of {LATENTS}",
    "cache_before_connector": f"use --text_cache_stage features of {TEXT}",
    "gemma_safetensors": "use --text_encoder",
    "ltx2_text_encoder_checkpoint": "use --ltxv2_model",
    **_each("use --text_encoder, the one encoder of LTX-2", "text_encoder1 text_encoder2"),
    **_each(
        "sound is taken from the clips; for files of their own give separate_audio_directory in the dataset TOML",
        "ltx2_audio_source ltx2_audio_dir ltx2_audio_ext",
    ),
    **_each("use --dry_run", "debug_mode console_width console_back console_num_images debug_dataset"),
    "caption_field": "captions are the field 'caption' of a jsonl, or .txt files",
}
"""Flags that mean something else here, or nothing: what to use."""

DATASET_KEYS: Mapping[str, str] = {
    "control_directory": "give reference_directory",
    "control_path": "give reference_path",
    "reference_cache_directory": "references are cached beside their clips; leave it out",
    "reference_audio_cache_directory": "references are cached beside their clips; leave it out",
    "loss_mask_directory": "give mask_directory, white counts",
    "separate_audio_buckets": "not needed: clips with and without sound are batched as they fit; leave it out",
    "caption_field": "captions are the field 'caption' of a jsonl; leave it out",
    "bucket_batch_sizes": "there is one batch_size; leave it out",
    "cache_only": "not needed: training runs from caches without the sources; leave it out",
    "debug_dataset": "run the caching program with --dry_run",
    "audio_bucket_strategy": "sound files are cut by target_seconds; leave it out",
    "audio_bucket_interval": "sound files are cut by target_seconds; leave it out",
    "no_resize_control": "give reference_downscale",
    "control_resolution": "give reference_downscale",
    **_each("of FramePack; leave it out", "fp_latent_window_size fp_1f_clean_indices fp_1f_target_index fp_1f_no_post"),
}
"""Keys of the dataset TOML -> what to do."""

PROMPT_FLAGS: Mapping[str, str] = {
    "fs": "leave it out: the shift of all prompts is --discrete_flow_shift X with --sample_scheduler flowmatch_discrete, of training",
    "cn": "give --v FILE, a reference (IC-LoRA)",
    "ci": "give --v FILE, a reference (IC-LoRA)",
    "vra": "give --v FILE and --ra FILE",
    "gl": "give --i FILE, or --k FRAME=FILE",
    "gk": "give --k FRAME=FILE",
    "of": "of FramePack; leave it out",
    "im": "give --box LEFT,TOP,WIDTH,HEIGHT with --iv FILE",
    "it": "of other models; leave it out",
    "ii": "of other models; leave it out",
    "p": "the prompt is the text before the first flag",
    "width": "give --w",
    "height": "give --h",
    "frames": "give --f",
    "seed": "give --d",
    "steps": "give --s",
    "fps": "give --fr",
}
"""Flags of a prompt line -> what to do."""

NETWORK_ARGS: Mapping[str, str] = {
    "algo": "the type of a network is type=, one of lora, dora, lokr, loha, full",
    "use_dora": "DoRA is type=dora",
    "dora_wd": "DoRA is type=dora",
    "conv_dim": "LTX-2 has no convolutions to adapt; leave it out",
    "conv_alpha": "LTX-2 has no convolutions to adapt; leave it out",
    "dropout": "give neuron_dropout={value} (of an adapter's inputs) or rank_dropout={value}",
    "network_dropout": "give neuron_dropout={value} (of an adapter's inputs) or rank_dropout={value}",
    "dim": "the rank is --network_dim {value}",
    "rank": "the rank is --network_dim {value}",
    "alpha": "alpha is --network_alpha {value}",
    "lora_target_preset": "give preset=: t2v is attention, v2v is attention_ff, audio is audio",
    "exclude_mod": "give exclude_patterns=REGEX; modulation is in no preset",
    "use_rslora": "give rank_stabilized=true",
    "rs_lora": "give rank_stabilized=true",
    "network_reg_dims": "give ranks=REGEX:N,...",
    "loraplus_unet_lr_ratio": "give loraplus_lr_ratio={value}",
    "decompose_both": "LoKr keeps its first factor whole; leave it out",
    "full_matrix": "a LoKr keeps its second factor whole where --network_dim is half its size or more; leave it out",
    "verbose": "what is adapted is in the table before the first step; leave it out",
}
"""Keys of `--network_args` -> what to do; `{value}` is what was given."""


def ours(key: str) -> str:
    """The flag, without its dashes, that a name is taken as."""
    return next((flag for flag, names in ALIASES.items() if key in names), key)


def answer(key: str) -> str | None:
    """What to use for a flag that a program lacks; None where the table does not have it."""
    if key in INSTEAD:
        return INSTEAD[key]
    return f"belongs to {ELSEWHERE[key]}" if key in ELSEWHERE else None
