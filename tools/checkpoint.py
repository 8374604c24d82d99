"""Checkpoints: python tools/checkpoint.py --help"""

from musubi_tuner.ltxv2_checkpoint import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
