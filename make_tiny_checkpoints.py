"""Write the tiny checkpoints: python make_tiny_checkpoints.py --output_dir FOLDER"""

from musubi_tuner.make_tiny import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
