"""Cache captions and sample prompts: python ltxv2_cache_text_encoder_outputs.py --help"""

from musubi_tuner.ltxv2_cache_text_encoder_outputs import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
