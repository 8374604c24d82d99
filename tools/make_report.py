"""The page of one run or of several: python tools/make_report.py --help"""

from musubi_tuner.ltxv2_report import main
from musubi_tuner.runtime.program import run_program

if __name__ == "__main__":
    run_program(main)
