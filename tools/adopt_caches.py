"""Take over caches of other tools: python tools/adopt_caches.py --help"""

from musubi_tuner.ltxv2_adopt_caches import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
