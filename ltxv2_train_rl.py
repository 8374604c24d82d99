"""Train a LoRA on scored rollouts: accelerate launch ltxv2_train_rl.py --help"""

from musubi_tuner.ltxv2_train_rl import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
