"""A whole guided sampling of LTX-2.5 against diffusers' transformer and ltx-core's steps, the first frame marked in both. float32, CPU."""

import torch

from musubi_tuner.generation.denoise import generate
from musubi_tuner.ltxv2 import geometry
from musubi_tuner.ltxv2.transformer.load import load_transformer
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
from tests import preview_parts as parts
from tests.parity.name_maps import to_diffusers
from tests.parity.test_sampling_loop import STEPS, official_sampling

TOLERANCE = 1e-5
FRAMES, WIDTH, HEIGHT = 17, 96, 64


class Theirs:
    """diffusers' transformer behind the interface of ltx-core's."""

    def __init__(self, ours: torch.nn.Module, section: dict, *, marked: bool) -> None:
        from diffusers import LTX2VideoTransformer3DModel

        self._marked = marked
        self._model = LTX2VideoTransformer3DModel(
            in_channels=128, out_channels=128, num_attention_heads=section["num_attention_heads"],
            attention_head_dim=section["attention_head_dim"], cross_attention_dim=section["cross_attention_dim"], audio_in_channels=128,
            audio_out_channels=128, audio_num_attention_heads=section["audio_num_attention_heads"],
            audio_attention_head_dim=section["audio_attention_head_dim"], audio_cross_attention_dim=section["audio_cross_attention_dim"],
            num_layers=section["num_layers"], caption_channels=section["caption_channels"], rope_type="split", rope_double_precision=True,
            cross_attn_timestep_scale_multiplier=1000, gated_attn=True, audio_gated_attn=True, cross_attn_mod=True,
            audio_cross_attn_mod=True, use_prompt_embeddings=False, use_prompt_adaln_single=True, ff_bias=False,
            use_keyframes_abs_pos_embedding=True,
        )  # fmt: skip
        self._model.load_state_dict({to_diffusers(name): value for name, value in ours.state_dict().items()}, strict=True)
        self._model.eval()

    def __call__(self, video, audio, perturbations):
        frames, (width, height) = geometry.latent_frames(FRAMES), geometry.latent_size(WIDTH, HEIGHT)
        marker = torch.zeros(1, frames * height * width, 1)
        marker[:, : height * width] = float(self._marked)
        return self._model(
            hidden_states=video.latent, audio_hidden_states=audio.latent, encoder_hidden_states=video.context,
            audio_encoder_hidden_states=audio.context, timestep=video.timesteps * 1000, audio_timestep=audio.timesteps * 1000,
            sigma=video.sigma * 1000, audio_sigma=audio.sigma * 1000, num_frames=frames, height=height, width=width, fps=24.0,
            audio_num_frames=audio.latent.shape[1], use_cross_timestep=True, video_keyframes_mask=marker, return_dict=False,
        )  # fmt: skip


def test_a_guided_sampling_marks_the_first_frame_as_official_inference_does(tiny_family, monkeypatch):
    from ltx_core.components.schedulers import LTX2Scheduler

    checkpoint = open_checkpoint(tiny_family.ltx25_transformer)
    transformer = load_transformer(checkpoint, mode="av", device="cpu", dtype=torch.float32, timestep_rule="cross")
    wrapper, noise = OfficialLTXV2Wrapper(transformer, "sd3_0_1"), {}
    made = parts.sample(
        wrapper,
        version="2.5",
        of_prompt=parts.prompt(width=WIDTH, height=HEIGHT, frames=FRAMES),
        of_options=parts.options(sample_steps=STEPS, stg_scale=0.0, modality_scale=1.0),
    )

    def remember(module: torch.nn.Module, arguments: tuple) -> None:
        noise.setdefault("video", arguments[0].latent.clone())
        noise.setdefault("audio", arguments[1].latent.clone())

    handle = wrapper.register_forward_pre_hook(remember)
    ours = generate(wrapper, made)
    handle.remove()
    widths = (wrapper.config.video_context_width, wrapper.config.audio_context_width)
    found = {"video": geometry.patchify_video(ours.video), "audio": geometry.patchify_audio(ours.audio)}
    # Schedules are compared elsewhere; here a rounding of sigma, which the model hears a thousand times as large, would hide the rest.
    monkeypatch.setattr(LTX2Scheduler, "execute", lambda self, steps: torch.as_tensor(made.plan.sigmas, dtype=torch.float32))
    distances = []
    for marked in (True, False):
        with torch.inference_mode():
            wanted = official_sampling(Theirs(transformer, checkpoint.config["transformer"], marked=marked), made, noise, widths)
        distances.append(max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in found))
    assert distances[0] < TOLERANCE < 1e-3 < distances[1], distances
