"""A checkpoint's components as diffusers' models: class, config, and where each of its tensors comes from.

| folder              | class of diffusers 0.42                  | from                                            | in the pipeline |
|---------------------|------------------------------------------|-------------------------------------------------|-----------------|
| `transformer`       | LTX2VideoTransformer3DModel              | transformer with both streams                   | yes             |
| `connectors`        | LTX2TextConnectors                       | text projection and connectors                  | yes             |
| `vae`               | AutoencoderKLLTX2Video                   | video VAE with the plain decoder                | yes             |
| `audio_vae`         | AutoencoderKLLTX2Audio                   | audio VAE                                       | yes             |
| `vocoder`           | LTX2Vocoder, LTX2VocoderWithBWE          | vocoder of 2.0, of 2.3 and 2.5                  | yes             |
| `duration_head`     | LTX2DurationHead                         | duration head of 2.5                            | yes             |
| `diffusion_decoder` | LTX2VideoDiffusionDecoderModel           | decoder of the diffusion VAE of 2.5             | its own         |

Where official files hold queries, keys and values in one tensor, diffusers has three: thirds of its rows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from musubi_tuner.conversion.checkpoint.components import TEXT, TRANSFORMER, components_of, model_names
from musubi_tuner.ltxv2.autoencoders import audio_vae, diffusion_decoder, video_vae, vocoder
from musubi_tuner.ltxv2.autoencoders.components import MEAN, STD
from musubi_tuner.ltxv2.text import duration, features
from musubi_tuner.ltxv2.transformer.diffusers_names import diffusers_tensor
from musubi_tuner.ltxv2.transformer.load import read_config
from musubi_tuner.ltxv2.versions import CONNECTORS, streams_of, transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint, building_from
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import names_of

FOLDERS = ("transformer", "connectors", "vae", "audio_vae", "vocoder", "duration_head", "diffusion_decoder")
IN_PIPELINE = FOLDERS[:-1]
"""Those that `LTX2Pipeline` takes."""
_STATISTICS = {MEAN: "latents_mean", STD: "latents_std"}
_THIRDS = "qkv"


@dataclass(frozen=True, slots=True)
class Model:
    """One of diffusers' models."""

    folder: str
    cls: Any
    config: Mapping[str, Any]
    """Arguments of the class."""
    targets: Mapping[str, tuple[str, ...]]
    """{full name in the checkpoint: names in the model}: one, or three that are thirds of its rows."""

    def config_text(self) -> str:
        """What its `config.json` holds."""
        return self.built().to_json_string()

    def built(self) -> Any:
        """On the meta device."""
        with torch.device("meta"):
            return self.cls(**self.config)


def models_of(checkpoint: Checkpoint, lengths: Mapping[str, tuple[int, ...]], encoder_width: int | None) -> list[Model]:
    """The models that a checkpoint's components become, each held against diffusers' own names and shapes.

    Args:
        lengths: shapes by full name, without what belongs to a quantized form.
        encoder_width: of the text encoder; None where no encoder is given, and the config says it.

    Raises:
        UserError: a component that diffusers has no class for, by its name, or one whose tensors do not fit.
    """
    found = [model_of(component, checkpoint, lengths, encoder_width) for component in components_of(checkpoint)]
    return [model for model in found if model is not None]


def model_of(component: str, checkpoint: Checkpoint, lengths: Mapping[str, tuple[int, ...]], encoder_width: int | None) -> Model | None:
    """One of them, by the name of the checkpoint's component; None where diffusers has no such model. Otherwise as `models_of`."""
    own = [name for name in components_of(checkpoint)[component] if name in lengths]
    if component == "vae" and "vae" not in checkpoint.config and "audio_vae" in checkpoint.config:
        component = "audio_vae"  # in a file of its own, whose names have no prefix
    if component not in _MAKERS:
        return None
    model = _MAKERS[component](checkpoint, own, encoder_width)
    _check(checkpoint, model, lengths)
    return model


def _transformer(checkpoint: Checkpoint, names: Sequence[str], encoder_width: int | None) -> Model:
    from diffusers import LTX2VideoTransformer3DModel

    official = transformer_names(checkpoint)
    if len(streams := streams_of(official)) == 1:
        raise UserError(f"{checkpoint.path}: a transformer of {streams[0]} alone, and diffusers' class has both streams. Give a whole one.")
    config = read_config(checkpoint)
    values = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.attention_head_dim,
        "cross_attention_dim": config.cross_attention_dim,
        "pos_embed_max_pos": config.positional_embedding_max_pos[0],
        "base_height": config.positional_embedding_max_pos[1],
        "base_width": config.positional_embedding_max_pos[2],
        "gated_attn": config.apply_gated_attention,
        "cross_attn_mod": config.cross_attention_adaln,
        "audio_in_channels": config.audio_in_channels,
        "audio_out_channels": config.audio_out_channels,
        "audio_num_attention_heads": config.audio_num_attention_heads,
        "audio_attention_head_dim": config.audio_attention_head_dim,
        "audio_cross_attention_dim": config.audio_cross_attention_dim,
        "audio_pos_embed_max_pos": config.audio_positional_embedding_max_pos[0],
        "audio_gated_attn": config.apply_gated_attention,
        "audio_cross_attn_mod": config.cross_attention_adaln,
        "num_layers": config.num_layers,
        "norm_eps": config.norm_eps,
        "caption_channels": config.caption_channels,
        "rope_theta": config.positional_embedding_theta,
        "rope_double_precision": config.frequencies_precision == "float64",
        "timestep_scale_multiplier": config.timestep_scale_multiplier,
        "cross_attn_timestep_scale_multiplier": config.av_ca_timestep_scale_multiplier,
        "rope_type": config.rope_type,
        "use_prompt_embeddings": config.has_caption_projection,
        "perturbed_attn": True,
        "ff_bias": config.ff_bias,
        "audio_ff_bias": config.audio_ff_bias,
        "use_prompt_adaln_single": config.use_prompt_adaln_single,
        "use_keyframes_abs_pos_embedding": config.use_keyframes_abs_pos_embedding,
    }
    here = set(names)
    targets = {full: (diffusers_tensor(name),) for name, full in official.items() if full in here}
    return Model("transformer", LTX2VideoTransformer3DModel, values, targets)


_CONNECTOR_NAMES = (
    (CONNECTORS[0], "video_connector."),
    (CONNECTORS[1], "audio_connector."),
    ("transformer_1d_blocks.", "transformer_blocks."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
    (f"{features.PREFIX}video_aggregate_embed.", "video_text_proj_in."),
    (f"{features.PREFIX}audio_aggregate_embed.", "audio_text_proj_in."),
    (f"{features.PREFIX}aggregate_embed.", "text_proj_in."),
)
"""Parts of names: (official, diffusers')."""


def _connectors(checkpoint: Checkpoint, names: Sequence[str], encoder_width: int | None) -> Model:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    section = checkpoint.config.get(TRANSFORMER, {})
    official = {name: full for name, full in model_names(checkpoint).items() if name.startswith(CONNECTORS)}
    official |= {name: name for name in names if name.startswith(features.PREFIX)}
    projections = {name: checkpoint.shape(full) for name, full in official.items() if name.endswith("aggregate_embed.weight")}
    registers = {name: checkpoint.shape(full)[0] for name, full in official.items() if name.endswith("learnable_registers")}
    if not projections or len(registers) != 2:
        lacks = "text connectors" if projections else "text projection"
        raise UserError(
            f"{checkpoint.path}: holds no {lacks}, and diffusers has projection and connectors in one model. Give the file that holds "
            "them too (of 2.5: the encoder's, gemma4-12b-with-proj-ltx-2.5...)."
        )
    if section.get("connector_ff_bias", True) is not True:
        raise UserError(f"{checkpoint.path}: text connectors without a bias in their feed-forward, which diffusers' class cannot hold.")
    both = f"{features.PREFIX}aggregate_embed.weight" not in projections
    widths = [shape[0] for _, shape in sorted(projections.items(), reverse=True)]  # video before audio
    flat = next(iter(projections.values()))[1]
    width = encoder_width or section.get("caption_channels", 3840)
    if flat % width or (not both and width != widths[0]):
        said = "of --gemma_path" if encoder_width else "by its config (caption_channels)"
        raise UserError(
            f"{checkpoint.path}: the text projection is {widths[0]} x {flat}, and the text encoder, {said}, is {width} wide. "
            "diffusers' class needs a width that divides it, which of 2.0 is the projection's own too. "
            "Give the right encoder by --gemma_path."
        )

    def value(key: str, stream: str, default: Any) -> Any:
        return section.get(f"{stream}connector_{key}", section.get(f"connector_{key}", default))

    values: dict[str, Any] = {"caption_channels": width, "text_proj_in_factor": flat // width, "per_modality_projections": both}
    values["proj_bias"] = any(name.endswith("aggregate_embed.bias") for name in official)
    values |= {"video_hidden_dim": widths[0], "audio_hidden_dim": widths[-1]} if both else {}
    for stream, ours, connector in (("video", "", CONNECTORS[0]), ("audio", "audio_", CONNECTORS[1])):
        values |= {
            f"{stream}_connector_num_attention_heads": value("num_attention_heads", ours, 30),
            f"{stream}_connector_attention_head_dim": value("attention_head_dim", ours, 128),
            f"{stream}_connector_num_layers": value("num_layers", ours, 2),
            f"{stream}_connector_num_learnable_registers": registers[f"{connector}learnable_registers"],
            f"{stream}_gated_attn": section.get("connector_apply_gated_attention", False),
        }
    values |= {
        "connector_rope_base_seq_len": section.get("connector_positional_embedding_max_pos", [1])[0],
        "rope_theta": section.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": section.get("frequencies_precision") == "float64",
        "rope_type": section.get("rope_type", "split"),
    }
    here = set(names)
    return Model("connectors", LTX2TextConnectors, values, {f: (_replaced(n, _CONNECTOR_NAMES),) for n, f in official.items() if f in here})


def _vae(checkpoint: Checkpoint, names: Sequence[str], encoder_width: int | None) -> Model:
    from diffusers import AutoencoderKLLTX2Video

    section = _section(checkpoint, "vae")
    if section.get("_class_name") == diffusion_decoder.CLASS:
        return _diffusion_decoder(checkpoint, section, names)
    with building_from(checkpoint, "vae"):
        config = video_vae.encoder_section(section)
        values = video_vae.diffusers_config(config)
    blocks = len(config["encoder_blocks"])
    bare = _bare(names, video_vae.PREFIX)
    targets = {
        full: (video_vae.to_diffusers_name(name, blocks),)
        for name, full in bare.items()
        if not name.startswith("per_channel") or name in _STATISTICS
    }
    return Model("vae", AutoencoderKLLTX2Video, values, targets)


def _diffusion_decoder(checkpoint: Checkpoint, section: Mapping[str, Any], names: Sequence[str]) -> Model:
    """Its encoder is left aside: `AutoencoderKLLTX2Video` has a plain decoder, or is not built."""
    from diffusers import LTX2VideoDiffusionDecoderModel

    with building_from(checkpoint, "vae"):
        values = diffusion_decoder.diffusers_config(section)
    targets: dict[str, tuple[str, ...]] = {}
    for name, full in _bare(names, video_vae.PREFIX).items():
        if name in _STATISTICS:
            targets[full] = (_STATISTICS[name],)
        elif name.startswith("decoder.") and not diffusion_decoder.ASIDE.match(name):
            targets[full] = _in_thirds(diffusion_decoder.to_diffusers_name(name), r"\.qkv\.", ".to_{}.")
    return Model("diffusion_decoder", LTX2VideoDiffusionDecoderModel, values, targets)


def _audio_vae(checkpoint: Checkpoint, names: Sequence[str], encoder_width: int | None) -> Model:
    from diffusers import AutoencoderKLLTX2Audio

    with building_from(checkpoint, "audio_vae"):
        values = audio_vae.diffusers_config(_section(checkpoint, "audio_vae"))
    bare = _bare(names, audio_vae.PREFIX)
    targets = {
        full: (_STATISTICS.get(name, name),) for name, full in bare.items() if not name.startswith("per_channel") or name in _STATISTICS
    }
    return Model("audio_vae", AutoencoderKLLTX2Audio, values, targets)


def _vocoder(checkpoint: Checkpoint, names: Sequence[str], encoder_width: int | None) -> Model:
    from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE

    section = _section(checkpoint, "vocoder")
    with building_from(checkpoint, "vocoder"):
        values = vocoder.two_stage_config(section) if "bwe" in section else vocoder.generator_config(section)
    targets = {full: (vocoder.to_diffusers_name(name),) for name, full in _bare(names, vocoder.PREFIX).items()}
    return Model("vocoder", LTX2VocoderWithBWE if "bwe" in section else LTX2Vocoder, values, targets)


def _duration_head(checkpoint: Checkpoint, names: Sequence[str], encoder_width: int | None) -> Model:
    from diffusers.pipelines.ltx2 import LTX2DurationHead

    head = duration.DurationHead.load(checkpoint, "meta")
    values = {
        "video_cross_attention_dim": head.widths[0],
        "audio_cross_attention_dim": head.widths[1],
        "pooler_hidden_dim": head.video_modality_emb.shape[0],
        "num_queries": head.attention_pooler.query_tokens.shape[0],
        "num_pooler_heads": duration.HEADS,
        "mlp_hidden_dim": head.mlp_hidden.out_features,
    }
    targets = {}
    for name, full in _bare(names, duration.PREFIX).items():
        name = name.replace(".cross_attn.out_proj.", ".to_out.")
        targets[full] = _in_thirds(name, r"\.cross_attn\.in_proj_(weight|bias)", r".to_{}.\1")
    return Model("duration_head", LTX2DurationHead, values, targets)


_MAKERS: Mapping[str, Callable[[Checkpoint, Sequence[str], int | None], Model]] = {
    TRANSFORMER: _transformer,
    TEXT: _connectors,
    "vae": _vae,
    "audio_vae": _audio_vae,
    "vocoder": _vocoder,
    "duration_head": _duration_head,
}


def _section(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    section = checkpoint.config.get(name)
    if section is None:
        raise UserError(
            f"{checkpoint.path}: its 'config' metadata has no '{name}' section, so no config of diffusers can be made for it. "
            "Tools that cut a file apart lose this: give an unmodified release file."
        )
    return section


def _bare(names: Sequence[str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in names}


def _replaced(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for ours, theirs in rules:
        name = name.replace(ours, theirs)
    return name


def _in_thirds(name: str, pattern: str, replacement: str) -> tuple[str, ...]:
    if not re.search(pattern, name):
        return (name,)
    return tuple(re.sub(pattern, replacement.format(letter), name) for letter in _THIRDS)


def third(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a third of the rows."""
    return (shape[0] // 3, *shape[1:])


def _check(checkpoint: Checkpoint, model: Model, lengths: Mapping[str, tuple[int, ...]]) -> None:
    """Hold names and shapes against the class itself, before anything is written.

    Raises:
        UserError: they differ.
    """
    with building_from(checkpoint, model.folder):
        wanted = {name: tuple(value.shape) for name, value in model.built().state_dict().items()}
    given = {name: third(lengths[full]) if len(names) > 1 else lengths[full] for full, names in model.targets.items() for name in names}
    lacks, more = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    wrong = [f"{name} {given[name]} in place of {wanted[name]}" for name in given if name in wanted and given[name] != wanted[name]]
    if lacks or more or wrong:
        says = [f"{what} {names_of(names)}" for what, names in (("lacks", lacks), ("has besides", more), ("has", wrong)) if names]
        raise UserError(
            f"{checkpoint.path}: its {model.folder} does not fit diffusers' {model.cls.__name__}: it {'; it '.join(says)}. "
            "`ltxv2 checkpoint verify` tells whether the file is whole."
        )
