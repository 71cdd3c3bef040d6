"""The picture of schemes: its numbers against plain means over the seeds, and kinds apart."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import trim_mean

from tests.experiments import test_report
from tests.experiments.test_report import make, study
from tests.experiments.test_report_of_maps import figures
from tests.kit.examples import example

KINDS = {"MC": "denoiser", "TD": "denoiser", "map": "map", "consistency": "to_clean"}


def test_every_scheme_has_a_row_among_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = example("schemes_on_one_map")
    monkeypatch.setattr(test_report, "figures", figures)
    monkeypatch.setattr(script, "kind_of", lambda panel, scheme: KINDS[scheme])
    findings = make(tmp_path, study(schemes=tuple(KINDS)))
    monkeypatch.setattr(script, "StudyFindings", lambda out: findings)
    [panel] = findings.panels()
    rows = {row["scheme"]: row for row in script.rows_of(panel)}
    assert list(rows) == ["MC", "TD", "consistency", "map"]
    seeds = panel.study.seeds
    for scheme, row in rows.items():
        found = [figures(scheme, seed) for seed in seeds]
        distances = [f["sample_distance"]["by_nfe"]["5"] for f in found]
        assert row["NFE 5"] == pytest.approx(trim_mean(distances, 0.25))
        assert row["NFE 5 low"] <= row["NFE 5"] <= row["NFE 5 high"]
        assert row[script.COST] == pytest.approx(4 if scheme == "MC" else 8)
        assert row["kind"] == KINDS[scheme] and row["seeds"] == len(seeds)
    errors = [figures("map", seed)["map_error"].values() for seed in seeds]
    geometric = [np.prod(list(e)) ** (1 / len(e)) for e in errors]
    assert rows["map"]["map error"] == pytest.approx(trim_mean(geometric, 0.25))
    assert rows["consistency"]["value error"] is None and rows["MC"]["map error"] is None
    [picture] = script.main(tmp_path)
    assert picture.stat().st_size > 10_000 and picture.with_suffix(".csv").is_file()
