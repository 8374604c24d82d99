"""The page of a run and that of a grid in a real browser: opened from disk, played, filtered, compared, picked from.

Needs Chromium (of the system's packages) and playwright (`pip install -c constraints.txt -e .[browser]`); skips without them.
SCREENSHOTS names a folder for pictures of the pages.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_report, ltxv2_rl_rounds, ltxv2_score_rollouts, ltxv2_train_rl
from musubi_tuner.command import dispatch
from musubi_tuner.training.page.record import Prompt, Record, write_record
from musubi_tuner.training.page.runs import find_runs
from musubi_tuner.training.page.write import write_page
from tests.e2e import test_rl_rounds as rl
from tests.e2e.test_grid import checkpoints as checkpoints  # a fixture
from tests.e2e.test_grid import grid_flags, run
from tests.e2e.test_preview_training import project as project
from tests.e2e.test_preview_training import train
from tests.e2e.test_run_page import previewed
from tests.e2e.test_run_page import runs as runs
from tests.rl_parts import make

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
NASTY = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = \'taken\'"> & "'
OF_PLAYED = "[...document.querySelectorAll('video')].map((one) => [one.currentTime, one.muted, one.paused])"
SEEN = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 800}}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra 'browser')")
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is installed")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=path, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens a page from disk; at the end, nothing may have gone wrong in it, and nothing come from elsewhere."""
    contexts, wrong = [], []

    def opened(path: Path, *, size: str = "wide", **more):
        context = browser.new_context(viewport=SEEN[size], accept_downloads=True, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "requestfailed",
            lambda request: wrong.append(f"{request.url}: {request.failure}") if "ERR_ABORTED" not in str(request.failure) else None,
        )
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(request.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_function("[...document.querySelectorAll('video')].every((one) => one.readyState >= 1)")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def plays_together(page) -> None:
    page.uncheck("#hover")
    page.click("#play")
    page.wait_for_function("[...document.querySelectorAll('video')].every((one) => one.currentTime > 0.05)")
    page.click("#play")
    times = [time for time, _, _ in page.evaluate(OF_PLAYED)]
    assert len(times) > 1 and max(times) - min(times) < 0.2
    page.evaluate("seek(0.2)")
    assert all(abs(time - 0.2) < 0.01 for time, _, _ in page.evaluate(OF_PLAYED))


def one_is_heard(page) -> None:
    sounds = page.locator(".cell button[aria-pressed]")
    for place in (0, 1):
        sounds.nth(place).click()
        muted = [muted for _, muted, _ in page.evaluate(OF_PLAYED)]
        assert muted == [other != place for other in range(len(muted))]
    sounds.nth(1).click()
    assert all(muted for _, muted, _ in page.evaluate(OF_PLAYED))


def shows_what_was_trained_on(page, *, clips: int) -> None:
    page.evaluate("for (const one of document.querySelectorAll('#receipts details')) one.open = true")
    looks = page.locator("#receipts .look")
    assert looks.count() == looks.locator("svg[role=img]").count() == clips
    looks.last.scroll_into_view_if_needed()
    for place in range(clips):
        looks.nth(place).scroll_into_view_if_needed()
        assert looks.nth(place).locator("img").get_attribute("alt").startswith("The middle of ")
    page.wait_for_function("[...document.querySelectorAll('.look img')].every((one) => one.complete && one.naturalWidth > 0)")


def test_the_page_of_a_run_plays_filters_and_keeps_picks(runs, visit):
    page = visit(runs[0] / "report.html")
    assert page.locator("#grid thead th").all_inner_texts() == ["step 0, the base", "step 2", "step 4"]
    assert page.locator("#grid tbody tr").count() == 2
    shows_what_was_trained_on(page, clips=2)
    assert "2 clip(s), 2 with sound" in page.locator("#receipts").inner_text()
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / "run.png", full_page=True)
    plays_together(page)
    one_is_heard(page)
    assert page.locator("#chart-losses path").count() >= 2 and page.locator("#chart-levels path").count() >= 2
    page.select_option("#against", "minutes")
    assert page.locator("#chart-losses svg[role=img]").get_attribute("aria-label").startswith("Losses against minutes. video: ")
    page.locator("#chart-losses svg[role=img]").press("ArrowLeft")
    assert "minutes" in page.locator("#chart-losses .readout").inner_text()
    page.get_by_role("button", name="audio", exact=True).first.click()
    assert "audio" not in page.locator("#chart-losses svg[role=img]").get_attribute("aria-label")
    page.fill("#layout input[type=search]", "a still")
    assert page.locator("#grid tbody tr").count() == 1
    page.fill("#layout input[type=search]", "")
    page.locator("#layout select").select_option("last")
    assert page.locator("#grid thead th").all_inner_texts() == ["step 0, the base", "step 4"]

    page.locator(".cell button", has_text="Better").nth(1).click()
    assert page.locator(".cell button", has_text="than this").nth(1).is_disabled(), "another prompt"
    page.locator(".cell button", has_text="than this").first.click()
    page.reload()
    with page.expect_download() as saved:
        page.click("#download")
    assert saved.value.suggested_filename == "lora_picks.jsonl"
    (line,) = Path(saved.value.path()).read_text(encoding="utf-8").splitlines()
    pick = json.loads(line)
    assert (pick["ltxv2_pick"], pick["prompt"], pick["seed"]) == (1, "A red disc", 10)
    assert pick["better"]["file"] == "lora_s00000004_00_10.mp4" and pick["worse"]["file"] == "lora_s00000000_00_10.mp4"
    assert pick["worse"]["loras"] == [] and pick["better"]["loras"][0]["name"] == "lora-step00000004.safetensors"


def test_three_runs_are_compared_in_one_file(runs, project, tiny_family, visit, tmp_path):
    three = train(project, tiny_family.ltx23, "page three", *previewed(project), "--seed", "7", "--network_dim", "8")
    assert ltxv2_report.main([*map(str, (*runs, three)), "--embed", "--output", str(tmp_path / "all.html")]) == 0
    page = visit(tmp_path / "all.html")
    heads, names = page.locator("#grid thead th"), ("one", "two", "three")
    assert heads.all_inner_texts() == [f"page {name}/lora: {step}" for name in names for step in ("step 0, the base", "step 4")]
    assert {"page one/lora: video", "page two/lora: audio"} <= set(page.locator("#chart-losses .legend button").all_inner_texts())
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / "compared.png", full_page=True)
    plays_together(page)
    assert page.locator("#set").get_by_role("row", name="--seed 42 7 7").count() == 1
    assert page.locator("#set").get_by_role("row", name="--network_dim 4 4 8").count() == 1
    page.get_by_role("checkbox", name="page one/lora").uncheck()
    assert heads.count() == 4 and "page one" not in page.locator("#chart-losses").inner_text()
    page.reload()
    assert heads.count() == 4, "kept"
    shows_what_was_trained_on(page, clips=6)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_and_text_has_contrast(runs, visit, scheme):
    page = visit(runs[0] / "report.html", size="phone", color_scheme=scheme, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= SEEN["phone"]["width"], "nothing but the grid scrolls sideways"
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= SEEN["phone"]["width"]
    light = """(name) => { const probe = document.body.appendChild(document.createElement('i')); probe.style.color = `var(${name})`;
      const parts = getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
      probe.remove();
      const [r, g, b] = parts.map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
    ground = page.evaluate(light, "--ground")
    for name, least in {"--ink": 7, "--faint": 4.5, "--mark": 4.5, **{f"--c{place}": 4.5 for place in range(6)}}.items():
        other = page.evaluate(light, name)
        assert (max(ground, other) + 0.05) / (min(ground, other) + 0.05) >= least, name
    unnamed = """[...document.querySelectorAll('button, select, input, img, svg[role=img]')].filter((one) =>
      !(one.innerText || one.ariaLabel || one.alt || one.labels?.length)).length"""
    assert page.evaluate(unnamed) == 0, "every control and picture has a name"


def test_what_users_wrote_does_nothing(visit, tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "x_s00000000_00_1.png").write_bytes(b"")
    record = Record(
        name="x", program=NASTY, started="2026-01-01T00:00:00+00:00", command=NASTY, device=NASTY, total=1, step=1,
        prompts=[Prompt(index=0, prompt=NASTY, negative=NASTY, seed=1, fps=24.0)], plan=[(NASTY, NASTY)], settings=[(NASTY, NASTY, "")],
    )  # fmt: skip
    write_record(tmp_path, record)
    write_page(tmp_path / "report.html", find_runs(tmp_path))
    page = visit(tmp_path / "report.html")
    assert page.title() == "x" and page.locator("#grid tbody th .label").inner_text() == NASTY
    assert page.locator("pre").inner_text() == NASTY and page.locator("img:not(.cell img)").count() == 0


def test_the_page_of_a_grid_plays_turns_and_keeps_picks(tiny_family, texts, checkpoints, visit, tmp_path):
    run(tiny_family, texts, tmp_path, *grid_flags(checkpoints)[:-2])
    page = visit(tmp_path / "grid.html")
    assert page.locator("#grid tbody tr").count() == 3
    plays_together(page)
    one_is_heard(page)
    page.get_by_label("Rows").select_option("strength")
    assert page.locator("#grid tbody tr").count() == 2 and page.locator("#grid thead th").count() == 4, "the base stands apart"
    page.locator(".cell button", has_text="Better").first.click()
    page.locator(".cell button", has_text="than this").first.click()
    page.reload()
    assert page.locator("#list li").count() == 1


def test_the_page_of_samples_gives_pairs_to_learn_from(tiny_family, tmp_path, visit):
    """Of one prompt and other seeds; what is downloaded is what the trainer reads."""
    folder = make(tiny_family, tmp_path / "Würfe")
    score = ["--reward_fn", "loudness", "--vae", str(tiny_family.ltx23), "--save_first", "2", "--device", "cpu"]
    assert ltxv2_score_rollouts.main(["--rl_rollout_cache", str(folder), *score]) == 0
    page = visit(folder / "scores" / "first.html")
    assert page.locator("#grid video").count() == 4 and page.locator("#grid tbody tr").count() == 2
    assert page.locator("#grid figcaption").first.text_content().startswith("loudness -")
    page.locator(".cell button", has_text="Better").nth(1).click()
    assert page.locator(".cell button:enabled", has_text="than this").count() == 1, "of the same prompt alone"
    page.locator(".cell button:enabled", has_text="than this").click()
    with page.expect_download() as found:
        page.click("#download")
    found.value.save_as(picks := tmp_path / found.value.suggested_filename)
    train = ["--rl_rollout_cache", str(folder), "--ltxv2_model", str(tiny_family.ltx23), "--rl_loss", "dpo", "--dpo_pairs", str(picks)]
    train += ["--network_dim", "4", "--device", "cpu", "--mixed_precision", "no", "--no-compile", "--output_dir", str(tmp_path / "out")]
    assert ltxv2_train_rl.main([*train, "--max_data_loader_n_workers", "0"]) == 0
    (line,) = [json.loads(one) for one in picks.read_text(encoding="utf-8").splitlines()]
    assert (line["better"]["file"], line["worse"]["file"]) == ("g0000_k01.mp4", "g0000_k00.mp4")


def test_the_page_of_rounds_in_a_browser(tiny_family, tmp_path, monkeypatch, visit):
    """A round beside its control: bars, both curves, samples that play with their scores."""
    monkeypatch.setattr(ltxv2_rl_rounds, "run_command", lambda name, argv: dispatch([name, *argv]))
    control, out = tmp_path / "control", tmp_path / "Runden é"
    config = rl.config_for(rl.CONFIGS[0], tiny_family, tmp_path)
    rl.with_changes(config, scores={"reward_fn": "loudness:1,sharpness:1"})
    assert ltxv2_rl_rounds.main(rl.words(config, out, 1)) == 0
    facts = json.loads((out / "rounds.json").read_text(encoding="utf-8"))
    facts["settings"]["stages"]["training"]["rl_shuffle_advantages"] = 1
    facts["rounds"][1]["heldout"] |= {"gain": 0.001, "error": 0.002}
    control.mkdir()
    (control / "rounds.json").write_text(json.dumps(facts), encoding="utf-8")
    assert ltxv2_rl_rounds.main(rl.words(config, out, 1, "--rl_control", str(control))) == 0
    page = visit(out / "rounds.html")
    assert page.title() == "Rounds of Runden é"
    assert "the best is round 0" in page.text_content("#state")
    legend = page.locator("#chart-gain .legend button")
    assert legend.all_text_contents() == ["these rounds", "control: shuffled advantages"]
    assert page.locator("#table tbody tr").count() == 2 and page.locator("#grid video").count() == 4
    assert page.locator("#table th[scope=col]").all_text_contents() == ["policy", "loudness", "sharpness", "gain", "control's gain"]
    assert page.locator("#charts-rewards svg[role=img]").count() == 2, "a reward has its own scale"
    assert page.evaluate("reward('sharpness', 1).map((one) => one.points.map(([x]) => x))") == [[0, 1], [0]], "learned from the base's"
    assert page.locator("#grid figcaption").first.text_content().startswith("loudness -")
    page.click("#play")
    page.wait_for_function(f"{OF_PLAYED}.every(([time, muted, paused]) => time > 0 && !paused)")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "rounds.png", full_page=True)
