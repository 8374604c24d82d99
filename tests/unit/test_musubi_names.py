"""Notes for musubi-tuner and its LTX-2 fork: each name is taken, or answered with what to use; none with a name that only looks alike."""

import logging

import pytest

from musubi_tuner.config import names
from musubi_tuner.config.caching import AudioCachingConfig, LatentCachingConfig, TextCachingConfig
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import describe, parse
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.networks.arguments import network_arguments
from musubi_tuner.networks.targets import TargetChoice
from musubi_tuner.runtime.errors import UserError
from tools import make_names_table

CACHING = {names.LATENTS: LatentCachingConfig, names.SOUND: AudioCachingConfig, names.TEXT: TextCachingConfig}
REQUIRED = ("--ltxv2_model", "m", "--dataset_config", "d.toml", "--ltxv2_timestep_format", "sd3_0_1")


def training(*argv):
    return parse(TrainingConfig, [*REQUIRED, *argv], prog="p", description="d")


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--save_precision bf16", "save_precision", "bfloat16"), ("--save_precision fp16", "save_precision", "float16"),
        ("--ltx2_mode v", "ltx_mode", "video"), ("--ltx_mode va", "ltx_mode", "av"),
        ("--lr_warmup_steps 10%", "lr_warmup_steps", 0.1), ("--lr_warmup_steps 0.1", "lr_warmup_steps", 0.1),
        ("--lr_decay_steps 2.5%", "lr_decay_steps", 0.025),
        ("--timestep_sampling sigmoid", "timestep_sampling", "logit_normal"), ("--loss_type l2", "loss_type", "mse"),
        ("--height 320", "sample_height", 320), ("--width 640", "sample_width", 640), ("--sample_num_frames 49", "sample_frames", 49),
        ("--audio_lr 1e-5", "audio_learning_rate", 1e-5), ("--gemma_root g", "text_encoder", "g"),
        ("--audio_loss_multiplier 2", "audio_loss_weight", 2.0), ("--strict_audio_warmup_steps 5", "audio_supervision_warmup_steps", 5),
        ("--discrete_flow_shift 1.0", "discrete_flow_shift", 1.0), ("--network_module networks.lora_ltx2", "network_module", None),
        ("--fp8_base --fp8_scaled", "fp8_scaled", True), ("--optimizer_type adamw8bit", "optimizer_type", "adamw8bit"),
    ],
)  # fmt: skip
def test_what_has_one_plain_meaning_is_taken(line, key, value):
    taken = training(*line.split()).flat()[key]
    assert taken == (line.split()[1] if value is None else value)


@pytest.mark.parametrize(
    "line",
    [
        "--sdpa", "--flash_attn", "--sage_attn", "--xformers", "--split_attn", "--compile_mode default", "--dynamo_backend INDUCTOR",
        "--persistent_data_loader_workers", "--ltx_version 2.3", "--ltx2_low_ram_load", "--use_pinned_memory_for_block_swap",
        "--cuda_allow_tf32", "--log_config", "--log_prefix p", "--metadata_title x", "--img_in_txt_in_offloading",
        "--precache_sample_prompts", "--sample_with_offloading", "--separate_audio_buckets",
    ],
)  # fmt: skip
def test_what_is_not_needed_is_named_and_changes_nothing(line, caplog):
    caplog.set_level(logging.INFO)
    assert training(*line.split(), "--seed", "7") == training("--seed", "7")
    assert caplog.messages == [f"not needed here, ignored: {line.split()[0]}"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--save_last_n_epochs 3", "use --save_last_n N"), ("--save_last_n_steps 3", "use --save_last_n N, which counts files"),
        ("--save_state_on_train_end", "use --save_state"), ("--vae_spatial_tile_sample_min_size 256", "--vae_spatial_tile_size N of"),
        ("--blank_preservation", 'use --dop_prompt ""'), ("--dop", "use --dop_prompt"), ("--dop_args class=x", "use --dop_prompt"),
        ("--lora_target_preset v2v", "use --network_args preset="), ("--network_dropout 0.1", "neuron_dropout=P.*rank_dropout=P"),
        ("--scale_weight_norms 1", "is not here; a lower"), ("--num_timestep_buckets 10", "use --timestep_sampling stratified"),
        ("--guidance_scale 4", "use --video_cfg_scale"), ("--gemma_load_in_8bit", f"belongs to {names.TEXT}"),
        ("--vae_dtype bf16", f"belongs to {names.LATENTS}"), ("--show_timesteps image", "noise_levels.md"),
        ("--preserve_distribution_shape", "--min_timestep and --max_timestep"), ("--training_comment x", "not written"),
        ("--no_metadata", "always written"), ("--resume_from_huggingface", "hf download"), ("--fp8_llm", "--gemma_load_in_8bit of"),
        ("--reference_downscale 2", "key of the dataset TOML"), ("--lr_scheduler_num_cycles 2", "--lr_scheduler_args num_cycles=N"),
        ("--lr_scheduler_power 2", "--lr_scheduler_args power=X"), ("--lr_scheduler_min_lr_ratio 0.1", "schedules fall to 0"),
        ("--strict_audio_mode", "--audio_supervision_mode error"), ("--nf4_base", "--weight_format nf4"),
        ("--sigmoid_scale 1.5", "std=X"), ("--audio_dim 8", "--network_args audio_dim=N"),
    ],
)  # fmt: skip
def test_what_means_something_else_is_answered_with_its_name_here(line, says):
    with pytest.raises(UserError, match=f"unknown flag '{line.split()[0]}': .*{says}") as caught:
        training(*line.split())
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--mixed_precision fp16", "must be one of no, bf16; LTX-2 is trained in bf16"),
        ("--timestep_sampling sigma", "shifted_logit_normal is"),
        ("--timestep_sampling shift", "logit_normal with --timestep_args mean=LN"),
        ("--weighting_scheme logit_normal", "--timestep_sampling"),
        ("--loss_type smooth_l1", "give huber"), ("--lr_scheduler rex", "give cosine"), ("--lr_warmup_steps 100%", "must be a number"),
        ("--lr_warmup_steps x%", "must be a number"), ("--vram_gb 10%", "must be a number"), ("--lr_scheduler_type=", "needs a value"),
        ("--device=", "needs a value"),
        ("--lr_scheduler adafactor", "give constant: --optimizer_type Adafactor is torch's here"),
    ],
)  # fmt: skip
def test_words_of_theirs_are_answered(line, says):
    with pytest.raises(UserError, match=says):
        training(*line.split())


def test_every_unknown_flag_has_a_line_and_what_only_looks_alike_is_not_suggested():
    flags = ["--sdpa", "--blank_preservation", "--dop", "x", "--quux", "1", "2", "--seeed", "3", "--seed", "4"]
    with pytest.raises(UserError) as caught:
        training(*flags)
    lines = str(caught.value).splitlines()
    assert lines[0] == "not needed here, and ignored: --sdpa"
    assert [line.split("'")[1] for line in lines[1:5]] == ["--blank_preservation", "--dop", "--quux", "--seeed"]
    assert lines[3] == "unknown flag '--quux'." and lines[4].startswith("unknown flag '--seeed'. Did you mean '--seed'?")
    assert len(lines) == 6


def test_caching_programs_take_the_same_names():
    for config in CACHING.values():
        model = next(flag for flag in describe(config) if flag.key == "ltxv2_model")
        assert model.aliases == ("--ltx2_checkpoint", "--dit")
    argv = ["--dataset_config", "d", "--ltx2_checkpoint", "m", "--vae_dtype", "bf16", "--ltx2_mode", "v"]
    config = parse(LatentCachingConfig, argv, prog="p", description="d")
    assert (str(config.vae.ltxv2_model), config.vae.vae_dtype, config.data.ltx_mode) == ("m", "bfloat16", "video")
    with pytest.raises(UserError, match="'--learning_rate': belongs to ltxv2_train_network.py"):
        parse(LatentCachingConfig, [*argv, "--learning_rate", "1"], prog="p", description="d")


def test_every_name_of_the_table_leads_to_what_is_there():
    flags = {program: {flag.key for flag in describe(config)} for program, config in {**CACHING, names.TRAINING: TrainingConfig}.items()}
    ours = set().union(*flags.values())
    assert set(names.ALIASES) | set(names.VALUES) | set(names.OTHER_VALUES) | set(names.PERCENTAGES) <= ours
    theirs = [name for aliases in names.ALIASES.values() for name in aliases]
    for name in (*theirs, *names.IGNORED, *names.INSTEAD):
        assert name not in ours, f"{name} is a flag of ours"
    assert not set(names.IGNORED) & set(names.INSTEAD) and len(theirs) == len(set(theirs)) and not set(theirs) & set(names.IGNORED)
    for program in CACHING:  # whatever training lacks of a caching program is answered
        lacking = flags[program] - flags[names.TRAINING] - set(theirs)
        assert all(names.answer(key) for key in lacking)


def test_a_config_file_takes_their_names_sections_and_empty_values(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "c.toml"
    path.write_text(
        '[model]\nltx2_checkpoint = "m"\n[data]\ndataset_config = "d"\nltx2_mode = "v"\nresume = ""\ndop_prompt = ""\n'
        '[training]\nsdpa = true\nltxv2_timestep_format = "sd3_0_1"\nlr_warmup_steps = "10%"\nfull_bf16 = false\nsave_precision = "bf16"\n',
        encoding="utf-8",
    )
    config = parse(TrainingConfig, ["--config_file", str(path), "--xformers"], prog="p", description="d")
    assert (str(config.model.ltxv2_model), config.ltx_mode, config.saving.resume) == ("m", "video", None)
    assert (config.optimization.lr_warmup_steps, config.preservation.dop_prompt, config.saving.save_precision) == (0.1, "", "bfloat16")
    assert caplog.messages == ["not needed here, ignored: --xformers, resume (empty), sdpa, full_bf16"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("full_bf16 = true\nblank_preservation = true", r"(?s)'full_bf16': .*float32.*\n.*'blank_preservation': use --dop_prompt"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "'seed' is given twice"),
        ('ltx2_checkpoint = "a"\nltxv2_model = "b"', "'ltxv2_model' is given twice, or is another name"),
        ("cuont = 1", "unknown key 'cuont'. Keys are"),
        ("sed = 1", "unknown key 'sed'. Did you mean 'seed'"),
        ('timestep_sampling = "sigma"', "shifted_logit_normal is how LTX-2"),
    ],
)
def test_mistakes_in_a_config_file_are_answered_alike(tmp_path, text, says):
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        training("--config_file", str(tmp_path / "c.toml"))


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        (r"[r'.*attn1\.to_q.*']", (r".*attn1\.to_q.*",)), (r"""['a', "b,c"]""", ("a", "b,c")), ("[]", ()), ("a,b", ("a", "b")),
        ("[av]_attn,to_q", ("[av]_attn", "to_q")), (r"""[ r'.*\.to_k$' ,r".*\.to_q$" ]""", (r".*\.to_k$", r".*\.to_q$")),
    ],
)  # fmt: skip
def test_patterns_may_be_a_python_list(text, patterns):
    for key in ("include_patterns", "exclude_patterns"):
        targets = network_arguments({key: text}, dim=4, alpha=4).targets
        assert targets == TargetChoice(**{key.removesuffix("_patterns"): patterns})


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"include_patterns": "['a'"}, r"must be REGEX,REGEX,... or a list"), ({"include_patterns": "['a', 1]"}, "or a list"),
        ({"include_patterns": "['a' + 'b']"}, "or a list"), ({"include_patterns": "['a', __import__('os')]"}, "or a list"),
        ({"include_patterns": f"['a', {'(' * 5000}"}, "or a list"),
        ({"exclude_patterns": r"[r.*attn1\.to_q.*]"}, "is a set of single characters"),
        ({"algo": "lokr"}, "algo=lokr: the type of a network is type="), ({"use_dora": "True"}, "DoRA is type=dora"),
        ({"conv_dim": "4"}, "no convolutions"), ({"dropout": "0.1"}, "give neuron_dropout=0.1"),
        ({"type": "lokr", "factor": "0"}, "factor=0: must be 1 at least, or -1"), ({"type": "lokr", "factor": "-2"}, "-1 at least"),
    ],
)  # fmt: skip
def test_network_arguments_of_other_trainers_are_answered(args, says):
    with pytest.raises(UserError, match=says):
        network_arguments(args, dim=4, alpha=4)


def test_dataset_keys_of_theirs_are_answered_all_at_once(tmp_path):
    path = tmp_path / "d.toml"
    path.write_text('[general]\ncaption_field = "x"\n[[datasets]]\nvideo_directory = "."\ncontrol_directory = "c"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)'caption_field': captions are.*\n.*'control_directory': give reference_directory"):
        load_dataset_config(path)


def test_the_page_of_names_is_current():
    assert make_names_table.PAGE.read_text(encoding="utf-8") == make_names_table.render(), "run: python tools/make_names_table.py"
