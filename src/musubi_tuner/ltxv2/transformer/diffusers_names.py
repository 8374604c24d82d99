"""What diffusers calls the transformer's modules and tensors. The map is complete: the same weights load strictly on both sides."""

_MODULES = (
    ("av_cross_attn_video_scale_shift.", "av_ca_video_scale_shift_adaln_single."),
    ("av_cross_attn_audio_scale_shift.", "av_ca_audio_scale_shift_adaln_single."),
    ("av_cross_attn_video_a2v_gate.", "av_ca_a2v_gate_adaln_single."),
    ("av_cross_attn_audio_v2a_gate.", "av_ca_v2a_gate_adaln_single."),
    ("audio_prompt_adaln.", "audio_prompt_adaln_single."),
    ("prompt_adaln.", "prompt_adaln_single."),
    ("audio_time_embed.", "audio_adaln_single."),
    ("time_embed.", "adaln_single."),
    ("audio_proj_in.", "audio_patchify_proj."),
    ("proj_in.", "patchify_proj."),
)
"""Beginnings of names: (diffusers', official)."""
_PARTS = (
    (".scale_shift_table_a2v_ca_video", ".video_a2v_cross_attn_scale_shift_table"),
    (".scale_shift_table_a2v_ca_audio", ".audio_a2v_cross_attn_scale_shift_table"),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)
"""Parts of names of tensors that no LoRA adapts: (official, diffusers')."""


def diffusers_module(module: str) -> str:
    """What diffusers calls an official module of the transformer, or a tensor in it."""
    for theirs, ours in _MODULES:
        if module.startswith(ours):
            return theirs + module.removeprefix(ours)
    return module


def official_module(module: str) -> str:
    """The inverse of `diffusers_module`."""
    for theirs, ours in _MODULES:
        if module.startswith(theirs):
            return ours + module.removeprefix(theirs)
    return module


def diffusers_tensor(name: str) -> str:
    """What diffusers calls an official tensor of the transformer."""
    name = diffusers_module(name)
    for ours, theirs in _PARTS:
        name = name.replace(ours, theirs)
    return name
