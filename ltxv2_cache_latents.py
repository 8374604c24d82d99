"""Cache video and image latents: python ltxv2_cache_latents.py --help"""

from musubi_tuner.ltxv2_cache_latents import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
