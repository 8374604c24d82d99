"""The benchmark of a whole run at toy width: the trainer takes the synthetic checkpoint and caches. No times are asserted."""

from benchmarks import training


def test_the_trainer_runs_on_synthetic_data_with_the_flags_that_follow(tmp_path, capfd):
    flags = ["--vram_gb", "0.5", "--device", "cpu", "--mixed_precision", "no", "--max_data_loader_n_workers", "0"]
    folder = tmp_path / "mit Leerzeichen ü"
    folder.mkdir()
    assert training.main(["--sizes", "toy", "--steps", "2", "--folder", str(folder), "--", *flags]) == 0
    text = capfd.readouterr().out
    assert "4 with sound" in text and "predicted" in text and "measured" in text
    assert "0 to 2 of 2" in text and "before the first step and after the last: " in text
    assert not any(folder.iterdir()), "what was written for the run is gone"


def test_a_run_that_fails_is_told(tmp_path, capfd):
    assert training.main(["--sizes", "toy", "--folder", str(tmp_path), "--", "--device", "cpu", "--vram_gb", "0.001"]) != 0
    assert "no plan fits" in capfd.readouterr().out
