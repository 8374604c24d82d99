"""Make clips with sound from prompts: python ltxv2_generate_video.py --help"""

from musubi_tuner.ltxv2_generate_video import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
