"""Train a LoRA from caches: accelerate launch ltxv2_train_network.py --help"""

from musubi_tuner.ltxv2_train_network import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
