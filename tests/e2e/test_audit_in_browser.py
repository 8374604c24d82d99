"""The page of an audit in a real browser, opened from disk: nothing is fetched, nothing goes wrong, and it fits wide and narrow screens.

Needs what `test_pages_in_browser.py` needs, and skips without it.
"""

import os
from pathlib import Path

import pytest

from tests.e2e.test_dataset_audit import NASTY, audit
from tests.e2e.test_dataset_audit import faulty as faulty  # a fixture
from tests.e2e.test_pages_in_browser import browser as browser
from tests.e2e.test_pages_in_browser import visit as visit

CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
      .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll('main *, header *')].map((one) => {
    const ink = light(getComputedStyle(one).color);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  }));
}"""
"""The least contrast of any text with the ground, as WCAG reckons it."""


@pytest.mark.parametrize("size", ["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_an_audit_is_readable(faulty, tmp_path, visit, size, scheme):
    audit(faulty, "--no-media", "--page", tmp_path / "audit.html", "--trigger", "no such word")
    page = visit(tmp_path / "audit.html", size=size, color_scheme=scheme)
    if "SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / f"audit_{size}_{scheme}.png", full_page=True)
    assert page.title() == "Audit of dataset.toml" and NASTY[:30] in page.inner_text("body"), "what users wrote is text"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wide tables scroll by themselves"
    assert page.evaluate(CONTRAST) >= 4.5
    for picture in page.locator("img").all():
        picture.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    page.click("a[href='#leak']")
    assert page.locator("#leak").is_visible() and page.url.endswith("#leak")
    assert page.locator("section:has(#leak) tbody tr").count() == 2
