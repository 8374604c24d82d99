"""Cache video latents, audio latents and text in turn: python ltxv2_cache_all.py --help"""

from musubi_tuner.ltxv2_cache_all import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
