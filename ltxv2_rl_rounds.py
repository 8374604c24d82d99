"""Reinforcement learning in rounds: python ltxv2_rl_rounds.py --help"""

from musubi_tuner.ltxv2_rl_rounds import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
