"""Take over data that the official trainer precomputed: python tools/import_precomputed.py --help"""

from musubi_tuner.ltxv2_import_precomputed import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
