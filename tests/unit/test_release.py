"""Networks and models of other releases: which go together."""

import logging
from pathlib import Path

import pytest

from musubi_tuner.networks.release import check_release
from musubi_tuner.runtime.errors import UserError


@pytest.mark.parametrize(
    ("trained_on", "model", "outcome"),
    [
        ("ltx-2.0", "2.3", "refused"),
        ("ltx-2.3", "2.0", "refused"),
        ("ltx-2.0", "2.5", "refused"),
        ("ltx-2.5", "2.0", "refused"),
        ("ltx-2.5", "2.3", "refused"),
        ("ltx-2.3", "2.5", "warned"),
        ("ltx-2.3", "2.3", "nothing"),
        ("ltx-9.9", "2.3", "nothing"),
        ("flux", "2.3", "nothing"),
        (None, "2.3", "nothing"),
    ],
)
def test_which_releases_go_together(caplog, trained_on, model, outcome):
    metadata = {} if trained_on is None else {"ss_base_model_version": trained_on}
    if outcome == "refused":
        with pytest.raises(UserError, match=rf"a.safetensors: was trained on {trained_on}, and --ltxv2_model is ltx-{model}"):
            check_release(Path("a.safetensors"), metadata, model)
        return
    with caplog.at_level(logging.WARNING):
        check_release(Path("a.safetensors"), metadata, model)
    assert ("mostly work there" in caplog.text) == (outcome == "warned")
