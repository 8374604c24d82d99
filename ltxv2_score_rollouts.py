"""Score rollouts by rewards, for reinforcement learning: python ltxv2_score_rollouts.py --help"""

from musubi_tuner.ltxv2_score_rollouts import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
