"""Kill a program again and again, and see that it ends as if nothing had been: python dev/kill_rounds.py PROGRAM [--kills N]

    python make_tiny_checkpoints.py --output_dir MODELS         makes what is loaded
    python dev/kill_rounds.py latents --models MODELS           200 kills by SIGKILL, SIGTERM and SIGINT; also audio, text, training

The same command, for training with --autoresume, is started until it ends with 0 and killed at random moments from its first import to its
last save; then its files must be those of an undisturbed run, byte by byte, and everything begins again from nothing, until all kills are
spent. After each kill: a documented exit code, no file that differs from the undisturbed run's (caching), no process left behind. A fifth
of the rounds starts a process of its own; the others are forked from one that has imported everything, which takes no seconds. A harness
that is itself ended goes on from what lies in the folder of --work.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DONE, INTERRUPTED, FORK_FAILED = 0, 130, 1
TIMED = re.compile(r"ltxv2_checked\.jsonl|report\.html|.*-report\.json")
"""Files that tell when something was done: of another run, other times."""
IMPORTS_SECONDS = 2.5
SAVED_EVERY = 5
STEP_FILE = re.compile(r"t-step(\d+)\.safetensors")
"""A LoRA between. Those of other steps are of interrupted runs; each counts as one of the last that are kept."""
PATIENCE_SECONDS = 60.0
"""For the end of a program that was asked to end, and of the processes that it has started."""
DATASET = """\
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
caption_extension = ".txt"
resolution = [96, 64]
target_frames = [9, 17]
"""
SCRIPTS = {
    "latents": "ltxv2_cache_latents",
    "audio": "ltxv2_cache_audio_latents",
    "text": "ltxv2_cache_text_encoder_outputs",
    "training": "ltxv2_train_network",
}
HEAVY = ("torch", "av", "accelerate", "diffusers", "transformers", "peft", "musubi_tuner.training.loop", "musubi_tuner.encoding.program")


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    seconds: float
    signal: int | None
    """None: it had ended before."""
    code: int
    cold: bool


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
    work = options.work / options.program
    log = work / "rounds.jsonl"
    whole, seconds = undisturbed(options, work)
    os.environ.update(variables())  # before torch, which forked rounds must use as the others do
    for name in (*HEAVY, f"musubi_tuner.{SCRIPTS[options.program]}"):
        importlib.import_module(name)
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rounds = [Round(**json.loads(line)) for line in lines]
    killed = sum(one.signal is not None for one in rounds)
    while killed < options.kills or (rounds and rounds[-1].signal is not None):
        one = one_round(options, work, seconds, kill=killed < options.kills, seed=len(rounds))
        rounds.append(one)
        killed += one.signal is not None
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        print(f"{options.program} {killed:4} {'cold' if one.cold else 'warm'} signal {one.signal} exit code {one.code}", flush=True)
        if problems := find_problems(options.program, one, contents(result_folder(options.program, work)), whole):
            print("\n".join(problems))
            return 1
        if one.signal is None:
            shutil.rmtree(result_folder(options.program, work))
    ended = sum(one.signal is None for one in rounds)
    print(f"{options.program}: {killed} kills, {ended} times to the end, each with the files of an undisturbed run, byte by byte")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=SCRIPTS)
    parser.add_argument("--models", type=Path, default=ROOT / "quickstart_output" / "models", help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=48, help="of the dataset; default: %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of training; default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ltxv2_kill_rounds", help="default: %(default)s")
    return parser.parse_args(arguments)


def undisturbed(options: argparse.Namespace, work: Path) -> tuple[dict[str, bytes], float]:
    """Its files, kept beside the others, and the seconds that it took once everything was imported."""
    kept, took = work / "whole", work / "seconds.json"
    result = result_folder(options.program, work)
    if not took.is_file():
        shutil.rmtree(work, ignore_errors=True)
        program = f"from musubi_tuner.tiny.clips import write_clips; write_clips(Path(sys.argv[1]), count={options.clips}, frames=17)"
        clips = [sys.executable, "-c", f"import sys; from pathlib import Path; {program}", str(work / "clips")]
        subprocess.run(clips, check=True, env=variables())  # not here: what has run threads must not be forked
        (work / "dataset.toml").write_text(DATASET, encoding="utf-8")
        before = [] if options.program != "training" else ["latents", "audio", "text"]
        for program in before:
            subprocess.run(command(options, program, work), check=True, env=variables(), capture_output=True)
        started = time.monotonic()
        subprocess.run(command(options, options.program, work), check=True, env=variables(), capture_output=True)
        seconds = time.monotonic() - started
        shutil.move(result, kept)
        took.write_text(json.dumps(max(1.0, seconds - IMPORTS_SECONDS)), encoding="utf-8")
    return contents(kept), json.loads(took.read_text(encoding="utf-8"))


def command(options: argparse.Namespace, program: str, work: Path) -> list[str]:
    model, gemma = options.models / "ltx2_tiny_2.3.safetensors", options.models / "gemma3"
    flags: list[object] = ["--dataset_config", work / "dataset.toml", "--ltx_mode", "av", "--device", "cpu"]
    match program:
        case "latents":
            flags += ["--vae", model]
        case "audio":
            flags += ["--audio_vae", model]
        case "text":
            flags += ["--ltxv2_model", model, "--text_encoder", gemma]
        case "training":
            flags += ["--ltxv2_model", model, "--ltxv2_timestep_format", "flowmatch_1_1000", "--network_dim", "4", "--network_alpha", "4"]
            flags += ["--mixed_precision", "no", "--save_precision", "float32", "--max_data_loader_n_workers", "1"]
            flags += ["--max_train_steps", options.steps, "--save_state", "--save_every_n_steps", SAVED_EVERY, "--save_last_n", "2"]
            flags += ["--output_dir", result_folder(program, work), "--output_name", "t", "--autoresume"]
    return [sys.executable, str(ROOT / f"{SCRIPTS[program]}.py"), *map(str, flags)]


def variables() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def result_folder(program: str, work: Path) -> Path:
    return work / ("training" if program == "training" else "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file() and not TIMED.fullmatch(path.name)}


def one_round(options: argparse.Namespace, work: Path, seconds: float, *, kill: bool, seed: int) -> Round:
    draw = random.Random(f"{options.program} {seed}")
    cold = not hasattr(os, "fork") or seed % 5 == 0
    wait, number = draw.uniform(0, seconds + (IMPORTS_SECONDS if cold else 0)), draw.choice(SIGNALS)
    words = command(options, options.program, work)
    with (work / "output.txt").open("ab") as output:
        process = started_cold(words, output.fileno()) if cold else forked(words, output.fileno())
    end = time.monotonic() + wait
    while (code := exit_code(process)) is None and (not kill or time.monotonic() < end):
        time.sleep(0.002)
    if code is None:
        os.kill(process, number)
        end = time.monotonic() + PATIENCE_SECONDS
        while (code := exit_code(process)) is None:
            if time.monotonic() > end:
                raise SystemExit(f"round {seed}: process {process} has not ended {PATIENCE_SECONDS:.0f} s after signal {number}")
            time.sleep(0.01)
        return Round(seconds=wait, signal=number, code=code, cold=cold)
    return Round(seconds=wait, signal=None, code=code, cold=cold)


def started_cold(words: Sequence[str], output: int) -> int:
    return subprocess.Popen(words, stdout=output, stderr=output, env=variables(), start_new_session=True).pid


def forked(words: Sequence[str], output: int) -> int:
    """A process that has imported everything, and now is the program."""
    if child := os.fork():
        return child
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = list(words[1:])
    from musubi_tuner.runtime.program import run_program

    code = FORK_FAILED
    try:
        run_program(importlib.import_module(f"musubi_tuner.{Path(words[1]).stem}").main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def exit_code(process: int) -> int | None:
    """As subprocess has it: minus the signal that has ended it; None while it runs. Where it has ended, so have those it started."""
    ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        return None
    end = time.monotonic() + PATIENCE_SECONDS
    while group_lives(process):
        if time.monotonic() > end:
            raise SystemExit(f"a process that {process} has started still runs {PATIENCE_SECONDS:.0f} s after its end")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def find_problems(program: str, one: Round, found: dict[str, bytes], whole: dict[str, bytes]) -> list[str]:
    expected = {DONE} if one.signal is None else {DONE, INTERRUPTED, -one.signal}
    if one.signal in (signal.SIGTERM, signal.SIGINT) and not one.cold:
        expected -= {-one.signal}  # only before the program has begun to run
    problems = [] if one.code in expected else [f"exit code {one.code} after signal {one.signal}"]
    if one.signal is None:
        missing, more = sorted(whole.keys() - found.keys()), found.keys() - whole.keys()
        interim = {name for name in more if (step := STEP_FILE.fullmatch(name)) and int(step[1]) % SAVED_EVERY}
        problems += [f"missing: {name}" for name in missing if not STEP_FILE.fullmatch(name)]
        problems += [f"missing: {name}" for name in missing[len(interim) :] if STEP_FILE.fullmatch(name)]
        problems += [f"left behind: {name}" for name in more - interim]
    if one.signal is None or program != "training":
        problems += [f"differs: {name}" for name in whole.keys() & found.keys() if found[name] != whole[name]]
    return problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
