"""Official transformer names <-> diffusers names; complete, so that strict loading works both ways."""

import re

RULES = (
    (r"^patchify_proj\.", "proj_in."),
    (r"^audio_patchify_proj\.", "audio_proj_in."),
    (r"^adaln_single\.", "time_embed."),
    (r"^audio_adaln_single\.", "audio_time_embed."),
    (r"^prompt_adaln_single\.", "prompt_adaln."),
    (r"^audio_prompt_adaln_single\.", "audio_prompt_adaln."),
    (r"^av_ca_video_scale_shift_adaln_single\.", "av_cross_attn_video_scale_shift."),
    (r"^av_ca_audio_scale_shift_adaln_single\.", "av_cross_attn_audio_scale_shift."),
    (r"^av_ca_a2v_gate_adaln_single\.", "av_cross_attn_video_a2v_gate."),
    (r"^av_ca_v2a_gate_adaln_single\.", "av_cross_attn_audio_v2a_gate."),
    (r"\.scale_shift_table_a2v_ca_video$", ".video_a2v_cross_attn_scale_shift_table"),
    (r"\.scale_shift_table_a2v_ca_audio$", ".audio_a2v_cross_attn_scale_shift_table"),
    (r"\.q_norm\.", ".norm_q."),
    (r"\.k_norm\.", ".norm_k."),
)


def to_diffusers(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name
