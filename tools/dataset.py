"""Datasets and their caches: python tools/dataset.py --help"""

from musubi_tuner.ltxv2_dataset import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
