"""Kill rounds of reinforcement learning again and again, and see that they end as if nothing had been: python dev/kill_rl_rounds.py

    python make_tiny_checkpoints.py --output_dir MODELS         makes what is loaded
    python dev/kill_rl_rounds.py --models MODELS                30 kills by SIGKILL, SIGTERM and SIGINT

`ltxv2_rl_rounds.py` makes three small rounds of GRPO in programs of their own. Its process group is killed at random moments, half of the
signals reach the driver alone, and the same command is started again until it ends with 0. Then its folder must hold the files
of an undisturbed run, byte by byte, and everything begins again from nothing, until all kills are spent. After each kill: a documented exit
code, no process left behind, no sample, scored rollout or LoRA under its final name that differs. A harness that is itself ended goes on.
"""

import argparse
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kill_rounds import DONE, INTERRUPTED, PATIENCE_SECONDS, SIGNALS, TIMED, exit_code, variables

ROOT = Path(__file__).resolve().parents[1]
SAVED_EVERY = 4
STEP = re.compile(r"-step(\d+)(-state)?(?=[./])")
"""Of a LoRA between, or of a state. Those of other steps than were asked for are of interrupted runs."""
STAGE = re.compile(r"^=== ltxv2 (\S+): \S*?(before|round_\d+)", re.MULTILINE)
CONFIG = """\
[rollouts]
ltxv2_model = {model}
text_cache = "texts"
rl_group_size = 2
sample_width = 64
sample_height = 64
sample_frames = 9
sample_steps = 3
video_cfg_scale = 1.0
audio_cfg_scale = 1.0
stg_scale = 0.0
modality_scale = 1.0
rl_sde_type = "cps"
rl_sde_steps = 1
rl_sde_window = "0:2"
device = "cpu"

[scores]
vae = {model}
reward_fn = "loudness:1"
device = "cpu"

[training]
ltxv2_model = {model}
network_dim = 4
network_alpha = 4.0
learning_rate = 1e-3
rl_loss = "grpo"
ppo_clip_eps = 0.1
device = "cpu"
mixed_precision = "no"
compile = false
max_data_loader_n_workers = 0
save_precision = "float32"
save_state = true
save_every_n_steps = {saved_every}
"""
LEARNED, HELDOUT = ("a dog barks", "rain on a roof"), ("a cat", "wind")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of the driver."""

    seconds: float
    signal: int | None
    """None: it had ended before."""
    alone: bool
    """Whether the signal went to the driver and not to its group."""
    code: int
    stage: str
    """What it was at."""


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
    work = options.work.resolve()
    whole, seconds = undisturbed(options, work)
    print(f"an undisturbed run: {seconds:.0f} s, {len(whole)} files", flush=True)
    log, out = work / "attempts.jsonl", work / "rl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    attempts = [Attempt(**json.loads(line)) for line in lines]
    killed = sum(one.signal is not None for one in attempts)
    while killed < options.kills or (attempts and attempts[-1].signal is not None):
        one = attempt(work, seconds * options.longest, kill=killed < options.kills, seed=len(attempts))
        attempts.append(one)
        killed += one.signal is not None
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(one)) + "\n")
        to = "" if one.signal is None else f" to {'the driver' if one.alone else 'all'}"
        print(f"{killed:4} after {one.seconds:6.1f} s: signal {one.signal}{to}, exit code {one.code}, at {one.stage}", flush=True)
        if problems := find_problems(one, contents(out), whole):
            print("\n".join(problems))
            return 1
        if one.signal is None:
            shutil.rmtree(out)
    ended, spent = sum(one.signal is None for one in attempts), sum(one.seconds for one in attempts)
    print(f"by signal: {dict(Counter(signal.Signals(one.signal).name for one in attempts if one.signal is not None))}")
    print(f"by stage: {dict(Counter(one.stage.split()[0] for one in attempts if one.signal is not None))}")
    print(f"{killed} kills, {ended} runs to the end, {spent:.0f} s, 0 differences from the files of an undisturbed run")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "quickstart_output" / "models", help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--longest", type=float, default=1 / 3, help="wait before a kill, as a part of an undisturbed run; default: 1/3")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ltxv2_kill_rl_rounds", help="default: %(default)s")
    return parser.parse_args(arguments)


def undisturbed(options: argparse.Namespace, work: Path) -> tuple[dict[str, bytes], float]:
    """Its files, kept beside the others, and the seconds that it took."""
    kept, took = work / "whole", work / "seconds.json"
    if not took.is_file():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        models = options.models.resolve()
        model = str(models / "ltx2_tiny_2.3.safetensors")
        (work / "rl.toml").write_text(CONFIG.format(model=json.dumps(model), saved_every=SAVED_EVERY), encoding="utf-8")
        for name, prompts in (("prompts", LEARNED), ("heldout", HELDOUT), ("all", (*LEARNED, *HELDOUT))):
            (work / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        cache_texts(work, model, models / "gemma3")
        started = time.monotonic()
        subprocess.run(command(), cwd=work, check=True, env=variables(), capture_output=True)
        seconds = time.monotonic() - started
        shutil.move(work / "rl", kept)
        took.write_text(json.dumps(seconds), encoding="utf-8")
    return contents(kept), json.loads(took.read_text(encoding="utf-8"))


def cache_texts(work: Path, model: str, encoder: Path) -> None:
    """Of all prompts, so that no stage has to load the encoder."""
    program = "import sys; from pathlib import Path; from musubi_tuner.tiny.clips import write_clips; "
    program += "write_clips(Path(sys.argv[1]), count=1, frames=9)"
    subprocess.run([sys.executable, "-c", program, str(work / "clips")], check=True, env=variables())
    dataset = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "texts"\ncaption_extension = ".txt"\nresolution = [96, 64]\n'
    (work / "dataset.toml").write_text(f"{dataset}target_frames = [9]\n", encoding="utf-8")
    words = ["--dataset_config", "dataset.toml", "--ltxv2_model", model, "--text_encoder", str(encoder), "--ltx_mode", "av"]
    words = [str(ROOT / "ltxv2_cache_text_encoder_outputs.py"), *words, "--sample_prompts", "all.txt", "--device", "cpu"]
    subprocess.run([sys.executable, *words], cwd=work, check=True, env=variables(), capture_output=True)


def command() -> list[str]:
    words = ["--rl_config", "rl.toml", "--rl_prompts", "prompts.txt", "--rl_heldout_prompts", "heldout.txt", "--rl_heldout_group_size", "2"]
    return [sys.executable, str(ROOT / "ltxv2_rl_rounds.py"), *words, "--rl_page_samples", "0", "--rl_rounds", "3", "--output_dir", "rl"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files by their path in the folder, hidden ones too, but those that tell times."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not TIMED.fullmatch(path.name))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def attempt(work: Path, longest: float, *, kill: bool, seed: int) -> Attempt:
    draw = random.Random(f"rl rounds {seed}")
    wait, number, alone = draw.uniform(0, longest), draw.choice(SIGNALS), draw.random() < 0.5
    said = work / "output.txt"
    started = time.monotonic()
    with said.open("wb") as output:
        process = subprocess.Popen(
            command(), cwd=work, stdout=output, stderr=output, env=variables() | {"PYTHONUNBUFFERED": "1"}, start_new_session=True
        ).pid
    while (code := exit_code(process)) is None and (not kill or time.monotonic() < started + wait):
        time.sleep(0.005)
    taken, sent = time.monotonic() - started, code is None
    if code is None:
        (os.kill if alone else os.killpg)(process, number)
        end = time.monotonic() + PATIENCE_SECONDS
        while (code := exit_code(process)) is None:
            if time.monotonic() > end:
                raise SystemExit(f"attempt {seed}: process {process} has not ended {PATIENCE_SECONDS:.0f} s after signal {number}")
            time.sleep(0.01)
        while is_alive(process):  # what a driver that was killed had started ends by itself
            if time.monotonic() > end:
                raise SystemExit(f"attempt {seed}: a program of process {process} is there {PATIENCE_SECONDS:.0f} s after signal {number}")
            time.sleep(0.01)
    stages = STAGE.findall(said.read_text(encoding="utf-8", errors="replace"))
    stage = " of ".join(stages[-1]) if stages else "start"
    return Attempt(seconds=taken, signal=number if sent else None, alone=sent and alone, code=code, stage=stage)


def is_alive(group: int) -> bool:
    """Whether a process of the group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def find_problems(one: Attempt, found: Mapping[str, bytes], whole: Mapping[str, bytes]) -> list[str]:
    """Lines to print; none where all is well."""
    expected = {DONE} if one.signal is None else {DONE, INTERRUPTED, -one.signal}
    if one.code not in expected:
        return [f"exit code {one.code} after signal {one.signal}, see output.txt"]
    problems = []
    compared = whole.keys() & found.keys()
    if one.signal is None:
        more = [name for name in found.keys() - whole.keys() if not interim(name)]
        problems += [f"left behind: {name}" for name in sorted(more)]
        problems += [f"missing: {name}" for name in sorted(whole.keys() - found.keys()) if not pushed_out(name, found)]
    else:  # the best LoRA of all, and what a stage writes on, are still to come
        compared = {name for name in compared if name.endswith(".safetensors") and "/" in name}
    return problems + [f"differs: {name}" for name in sorted(compared) if found[name] != whole[name]]


def interim(name: str) -> bool:
    """Whether it is of a step at which training was interrupted."""
    step = STEP.search(name)
    return step is not None and int(step[1]) % SAVED_EVERY != 0


def pushed_out(name: str, found: Mapping[str, bytes]) -> bool:
    """Whether it is of a state in whose place one of an interrupted run is among the last that are kept."""
    step = STEP.search(name)
    if step is None or step[2] is None:
        return False
    folder = name[: step.start()]
    return any(other.startswith(folder) and interim(other) and STEP.search(other)[2] for other in found)  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
