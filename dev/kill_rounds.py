"""Kill training again and again, and see that it ends as if nothing had been: python dev/kill_rounds.py [--quickstart FOLDER] [--kills N]

    python quickstart.py             makes what is trained on
    python dev/kill_rounds.py        200 kills by SIGKILL, SIGTERM and SIGINT, about half an hour on two cores

The same command, with --autoresume, is started until it ends with 0, and killed at random moments, from its first import to its last save.
The LoRA must be the bytes of an undisturbed run's, every exit code one that is documented, and no temporary file may be left. A harness
that is itself ended goes on from what lies in the folder of --work.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST_SECONDS = 15.0
"""Of a round: enough for imports, loading and some steps."""
INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    whole, killed, log = (options.work / name for name in ("whole", "killed", "rounds.jsonl"))
    if not (whole / "t.safetensors").is_file():
        subprocess.run(command(options, whole), check=True, capture_output=True)
    problems = []
    rounds = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    while True:
        code, number = one_round(command(options, killed), kill=len(rounds) < options.kills, seed=len(rounds))
        if number is None and code == 0:
            break
        if code not in (0, INTERRUPTED, None if number is None else -number):
            problems.append(f"round {len(rounds)}: exit code {code} after signal {number}")
            break
        rounds.append({"signal": number, "code": code, "files": sorted(path.name for path in killed.glob("*"))})
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounds[-1]) + "\n")
        print(f"{len(rounds):4} signal {number} exit code {code}", flush=True)
    problems += [f"left behind: {path.name}" for pattern in (".*", "*.lock") for path in killed.glob(pattern)]
    if not problems and (killed / "t.safetensors").read_bytes() != (whole / "t.safetensors").read_bytes():
        problems.append("the LoRA is not that of the undisturbed run")
    print("\n".join(problems) or f"{len(rounds)} rounds: the LoRA is that of the undisturbed run, byte by byte")
    return 1 if problems else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=ROOT / "quickstart_output", help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="of the run; default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ltxv2_kill_rounds", help="default: %(default)s")
    return parser.parse_args(arguments)


def command(options: argparse.Namespace, output: Path) -> list[str]:
    flags = ["--dataset_config", options.quickstart / "dataset.toml", "--ltx_mode", "av"]
    flags += ["--ltxv2_model", options.quickstart / "models" / "ltx2_tiny_2.3.safetensors", "--ltxv2_timestep_format", "flowmatch_1_1000"]
    flags += ["--network_dim", "4", "--network_alpha", "4", "--device", "cpu", "--mixed_precision", "no", "--save_precision", "float32"]
    flags += ["--max_data_loader_n_workers", "1", "--max_train_steps", options.steps, "--validate_every_n_steps", options.steps]
    flags += ["--output_dir", output, "--output_name", "t", "--autoresume"]
    flags += ["--save_state", "--save_every_n_steps", "5", "--save_last_n", "2"]
    return [sys.executable, str(ROOT / "ltxv2_train_network.py"), *map(str, flags)]


def one_round(words: Sequence[str], *, kill: bool, seed: int) -> tuple[int, int | None]:
    """Exit code, and the signal that was sent; None where the program ended before."""
    draw = random.Random(seed)
    seconds, number = draw.uniform(0, LONGEST_SECONDS), draw.choice(SIGNALS)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + seconds
        while process.poll() is None and (not kill or time.monotonic() < end):
            time.sleep(0.01)
        if process.poll() is not None:
            return process.returncode, None
        process.send_signal(number)
        return process.wait(), int(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
