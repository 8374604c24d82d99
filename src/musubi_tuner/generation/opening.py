"""From the flags of a program that generates to the files that its clips are made with, opened."""

from functools import cache, partial

from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.generation.contexts import TextSource
from musubi_tuner.generation.prepare import ModelFiles
from musubi_tuner.generation.setting import Setting, find_distilled_lora, open_upsampler
from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, encoder_options
from musubi_tuner.ltxv2.text.pipeline import TextRecipe, projection_fingerprint, text_widths
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.placement.text import encode_prompts
from musubi_tuner.runtime.device import pick_device


def open_setting(config: GenerateConfig, program: str) -> Setting:
    """
    Args:
        program: for messages.

    Raises:
        UserError: a file that is missing, or another kind of file.
    """
    model = config.model
    checkpoint = open_checkpoint(model.ltxv2_model)
    return Setting(
        config=config,
        files=ModelFiles.beside(checkpoint, model.vae, model.audio_vae),
        texts=_texts(config, checkpoint, program),
        device=pick_device(model.device),
        upsampler=open_upsampler(config),
        distilled_lora=find_distilled_lora(config),
    )


def text_recipe(config: GenerateConfig, checkpoint: Checkpoint) -> TextRecipe | None:
    """How texts that are not cached are encoded; None without a text encoder."""
    model = config.model
    if model.text_encoder is None:
        return None
    options = encoder_options(
        model.text_encoder,
        tokenizer=model.tokenizer,
        backend=model.text_encoder_backend,
        device=pick_device(model.device),
        max_length=model.max_length,
        vram_gb=config.memory.vram_gb,
        ram_gb=config.memory.ram_gb,
    )
    return TextRecipe(checkpoint=checkpoint, config=read_config(checkpoint), options=options, mode=model.ltx_mode, stage="context")


def _texts(config: GenerateConfig, checkpoint: Checkpoint, program: str) -> TextSource:
    recipe = text_recipe(config, checkpoint)
    expected = {"widths": "+".join(map(str, text_widths(read_config(checkpoint), config.model.ltx_mode)))}
    if checkpoint.model_version:
        expected["model_version"] = checkpoint.model_version
    if config.model.max_length is not None:
        expected["max_length"] = str(config.model.max_length)

    @cache
    def projection() -> str:
        assert recipe is not None
        return projection_fingerprint(recipe.whole) if recipe.options.backend == "gemma" else "none"

    return TextSource(
        cache_directory=config.model.text_cache or config.clips.output_dir / "texts",
        expected=expected,
        encode=None if recipe is None else partial(encode_prompts, recipe),
        encoder=None if recipe is None else encoder_fingerprint(recipe.options),
        projection=None if recipe is None else projection,
        max_length=None if recipe is None else recipe.options.max_length,
        command=f"{program} ... --text_encoder FOLDER",
        remedy="or give the folder of texts that were cached for this model by --text_cache.",
    )
