"""Cache the sound of a dataset: python ltxv2_cache_audio_latents.py --help"""

from musubi_tuner.ltxv2_cache_audio_latents import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
