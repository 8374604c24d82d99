"""The benchmark at toy width: its gate holds, and its table is whole. No times are asserted."""

import pytest

from benchmarks import step

pytest.importorskip("ltx_core", reason="the reference implementation of the benchmark")


OTHER = """
from benchmarks import step_models

def make(config, section, weights, adapters):
    return step_models.ltx_core_peft(section, weights, adapters, checkpointed=False)
"""
"""What somebody writes to have another trainer timed."""


def test_step_benchmark_passes_its_gate_and_writes_its_table(tmp_path, capsys):
    wanted = ["ours", "ours-eager", "ours-streamed", "ours-fp8", "diffusers", "ltx-core"]
    argv = ["--sizes", "toy", "--device", "cpu", "--rounds", "1", "--output", str(tmp_path), "--impl", *wanted]
    other = tmp_path / "other.py"
    other.write_text(OTHER, encoding="utf-8")
    argv += ["--other", str(other), str(tmp_path / "absent.py")]
    assert step.main(argv) == 0
    (table,) = tmp_path.glob("*-step.md")
    text = table.read_text(encoding="utf-8")
    for title in ("ours, not compiled, nothing recomputed", "diffusers + peft, checkpointed", "ltx-core + peft", "fp8", "streamed"):
        assert f"- {title}" in text.replace("ours, half of the blocks streamed", "streamed").replace("ours, not compiled, fp8", "fp8")
    assert f"{tmp_path / 'absent.py'}: skipped" in text and f"- {other}: loss off by" in text
    assert text.count("| toy large |") == 9 and (tmp_path / table.with_suffix(".json").name).is_file()


def test_the_gate_can_close(tmp_path):
    import torch

    from benchmarks import step_models as models
    from benchmarks.block_counts import config_section
    from musubi_tuner.ltxv2.transformer.config import TransformerConfig
    from musubi_tuner.memory.checkpointing import Recompute

    section = config_section(True, 1)
    config = TransformerConfig.from_checkpoint_config(section)
    cpu = torch.device("cpu")
    weights, adapters = models.make_weights(config, cpu, torch.float32), models.make_adapters(config, 4)
    other = {name: value * 1.01 if name.endswith("attn1.to_q.weight") else value for name, value in weights.items()}
    sample = models.make_sample(config, (2, 2, 2, 5), 16, cpu, torch.float32)
    settings = {"level": Recompute.NOTHING, "compiled": False}
    makers = {
        "first": lambda: models.ours("first", config, weights, adapters, **settings),
        "other": lambda: models.ours("other", config, other, adapters, **settings),
    }
    with pytest.raises(SystemExit, match="the gate is closed: other"):
        step.check(makers, sample, tolerance=1e-4)
