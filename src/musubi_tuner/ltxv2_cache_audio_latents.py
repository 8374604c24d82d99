"""Caches the sound of a dataset, as sidecars of the video latents."""

from collections.abc import Sequence

from musubi_tuner.config.caching import AudioCachingConfig, first_given
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.config.flags import parse
from musubi_tuner.runtime.program import run_program

PROG = "ltxv2_cache_audio_latents.py"
DESCRIPTION = "Cache the sound of a dataset: the same windows in seconds as the video latents, one sidecar a clip."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    return _cache(parse(AudioCachingConfig, argv, prog=prog, description=DESCRIPTION))


def _cache(config: AudioCachingConfig) -> int:
    from musubi_tuner.encoding.audio import AUDIO_ENCODING, audio_encoder
    from musubi_tuner.encoding.makers import Encoder
    from musubi_tuner.encoding.program import cache_sidecars, plan_and_index
    from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE, audio_vae_fingerprint
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.runtime.processes import processes

    datasets = load_dataset_config(config.data.dataset_config)
    files = config.audio_vae
    checkpoint = open_checkpoint(first_given(("--audio_vae", files.audio_vae), ("--vae", files.vae), ("--ltxv2_model", files.ltxv2_model)))
    metadata = {"encoder_fingerprint": audio_vae_fingerprint(checkpoint), "encoding": AUDIO_ENCODING}
    with processes() as group:
        device = pick_device(config.work.device)
        encoder = Encoder(
            model_version=checkpoint.model_version,
            metadata=lambda clip, kind: metadata,
            load=lambda jobs, kind: audio_encoder(AudioVAE.load(checkpoint, device=device, parts=("encoder",))),
        )
        plans = plan_and_index(datasets, PROG, config.data, config.work, group)
        return cache_sidecars(plans, PROG, encoder, config.data, config.work, group)


if __name__ == "__main__":
    run_program(main)
