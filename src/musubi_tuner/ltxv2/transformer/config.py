"""The transformer's shape, from the checkpoint's own `config` metadata. Keys are the official ones."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from musubi_tuner.runtime.errors import UserError

_CONSTANTS: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_middle_indices_grid": True,
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
}
"""Values that our maths is written for (docs/explanation/model.md, "blocks"); another value in a checkpoint is an error."""

_TEXT_PROJECTION_KEYS = (
    "caption_proj_before_connector",
    "caption_projection_first_linear",
    "caption_proj_input_norm",
    "caption_projection_second_linear",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """What decides names, shapes and maths of the transformer."""

    num_layers: int = 48
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    in_channels: int = 128
    out_channels: int = 128
    cross_attention_dim: int = 4096
    caption_channels: int = 3840
    """Width of the text context of 2.0; unused from 2.3 on."""
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    audio_cross_attention_dim: int = 2048
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0
    positional_embedding_max_pos: tuple[int, ...] = (20, 2048, 2048)
    audio_positional_embedding_max_pos: tuple[int, ...] = (20,)
    timestep_scale_multiplier: float = 1000.0
    av_ca_timestep_scale_multiplier: float = 1.0
    rope_type: str = "split"
    frequencies_precision: str | None = None
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    caption_proj_before_connector: bool = False
    use_prompt_adaln_single: bool = True
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_keyframes_abs_pos_embedding: bool = False

    @property
    def video_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def has_caption_projection(self) -> bool:
        """Only in 2.0 does the transformer itself project the text context."""
        return not self.caption_proj_before_connector

    @property
    def video_context_width(self) -> int:
        """Width of the text context as the transformer takes it."""
        return self.caption_channels if self.has_caption_projection else self.cross_attention_dim

    @property
    def audio_context_width(self) -> int:
        return self.caption_channels if self.has_caption_projection else self.audio_cross_attention_dim

    @property
    def modulation_rows(self) -> int:
        """Rows of a block's AdaLN table: 6, and 3 more where the text attention is modulated."""
        return 9 if self.cross_attention_adaln else 6

    @property
    def has_prompt_adaln(self) -> bool:
        return self.cross_attention_adaln and self.use_prompt_adaln_single

    @classmethod
    def from_checkpoint_config(cls, section: Mapping[str, Any]) -> "TransformerConfig":
        """Read the `transformer` section of a checkpoint's `config`.

        Raises:
            UserError: a constant of the architecture has a value that this code was not written for, or a value is of another type.
        """
        for key, value in _CONSTANTS.items():
            if section.get(key, value) != value:
                raise UserError(f"checkpoint config: transformer.{key} is {section[key]!r}; only {value!r} is supported.")
        if any(section.get(key) for key in _TEXT_PROJECTION_KEYS[1:]):
            raise UserError(
                "checkpoint config: caption_projection_*_linear and caption_proj_input_norm must be false where they are present."
            )
        fields = [field for field in dataclasses.fields(cls) if field.name in section]
        config = cls(**{field.name: _checked(field.name, section[field.name], field.default) for field in fields})
        if config.num_attention_heads != config.audio_num_attention_heads:
            raise UserError("checkpoint config: num_attention_heads and audio_num_attention_heads must be equal.")
        if config.rope_type not in ("split", "interleaved"):
            raise UserError(f"checkpoint config: rope_type {config.rope_type!r}; only 'split' and 'interleaved' are supported.")
        return config


def is_known(key: str) -> bool:
    """Whether a key of the section is read, or held against what the maths is written for."""
    return key in _CONSTANTS or key in _TEXT_PROJECTION_KEYS or key in {field.name for field in dataclasses.fields(TransformerConfig)}


_MOST = 2**20
"""No width, count or position of a transformer is larger."""


def _checked(key: str, value: Any, default: Any) -> Any:
    """A value of the type that its field's default has; lists as tuples."""
    if isinstance(default, tuple):
        good = isinstance(value, list) and len(value) == len(default) and all(_is_number(one, int) for one in value)
        what = f"a list of {len(default)} whole numbers from 1"
    elif isinstance(default, bool):
        good, what = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, what = _is_number(value, int), "a whole number from 1"
    elif isinstance(default, float):
        good, what = _is_number(value, float), "a number over 0"
    else:
        good, what = isinstance(value, str) or value is default, "a text"
    if not good:
        raise UserError(f"checkpoint config: transformer.{key} is {value!r}, not {what}.")
    return tuple(value) if isinstance(value, list) else value


def _is_number(value: Any, kind: type[int] | type[float]) -> bool:
    return type(value) in (int, kind) and 0 < value <= _MOST
