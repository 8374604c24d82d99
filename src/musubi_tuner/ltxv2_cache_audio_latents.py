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
    from musubi_tuner.cache.names import AUDIO_ENDING, REFERENCE_AUDIO_ENDING
    from musubi_tuner.cache.sidecars import AUDIO_KEYS, REFERENCE_AUDIO_KEYS
    from musubi_tuner.encoding.program import Task, plan_and_index, run_task
    from musubi_tuner.encoding.sound import audio_jobs, audio_stages, reference_audio_jobs, reference_audio_stages
    from musubi_tuner.ltxv2.autoencoders.audio_vae import AudioVAE, audio_vae_fingerprint
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device
    from musubi_tuner.runtime.processes import processes

    datasets = load_dataset_config(config.data.dataset_config)
    files = config.audio_vae
    checkpoint = open_checkpoint(first_given(("--audio_vae", files.audio_vae), ("--vae", files.vae), ("--ltxv2_model", files.ltxv2_model)))
    encoder = audio_vae_fingerprint(checkpoint)
    with processes() as group:
        device = pick_device(config.work.device)
        task = Task(
            title="Audio latent caching",
            ending=AUDIO_ENDING,
            required=AUDIO_KEYS,
            make_stages=lambda jobs: audio_stages(AudioVAE.load(checkpoint, device=device, parts=("encoder",))),
        )
        plans = plan_and_index(datasets, task, config.data, config.work, group)
        jobs = audio_jobs(plans, encoder=encoder, model_version=checkpoint.model_version)
        code = run_task(task, plans, jobs, config.data, config.work, group)
        references = reference_audio_jobs(plans, encoder=encoder, model_version=checkpoint.model_version)
        if references:
            played = Task(
                title="Reference audio caching",
                ending=REFERENCE_AUDIO_ENDING,
                required=REFERENCE_AUDIO_KEYS,
                make_stages=lambda jobs: reference_audio_stages(AudioVAE.load(checkpoint, device=device, parts=("encoder",))),
            )
            code = max(code, run_task(played, plans, references, config.data, config.work, group))
        return code


if __name__ == "__main__":
    run_program(main)
