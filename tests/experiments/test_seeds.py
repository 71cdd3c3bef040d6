"""Several seeds of one training run: a folder, a table with intervals, more seeds later."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from diffrl.experiments.comparison import cell_figures
from diffrl.experiments.reports.anew import report_anew
from diffrl.experiments.reports.seeds import seeds_table
from diffrl.metrics.intervals import interval
from diffrl.training.runs import RunFolder, RunFolderError
from tests.kit.configs import TINY
from tests.kit.paths import EXAMPLES

pytestmark = pytest.mark.usefixtures("unrendered")


def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_td_lambda.py", *TINY, "workers=0", *words])
    runpy.run_path(str(EXAMPLES / "train_td_lambda.py"), run_name="__main__")


def refused(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, *words)
    assert "\n" not in str(end.value)
    return str(end.value)


def test_a_table_with_intervals_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(monkeypatch, "seeds=[1,2]")
    said = capsys.readouterr().out
    [out] = Path("runs").iterdir()
    assert f"report  {out / 'report.md'}" in said and "seeds 1, 2" in said
    cells = {folder.name.split("_")[0]: folder for folder in (out / "cells").iterdir()}
    assert cells.keys() == {"s1", "s2"}
    by_seed = [RunFolder(folder).results()["objectives"] for _, folder in sorted(cells.items())]
    td, mc = ([run[name]["value_error"]["1"] for run in by_seed] for name in ("td", "monte_carlo"))
    row = next(line for line in said.splitlines() if "value error, σ = 1 " in line)
    head = next(line for line in said.splitlines() if "Monte Carlo  " in line)
    assert re.split(r" {2,}", head.strip()) == ["TD(lookahead=0.125)", "Monte Carlo", "ratio"]
    ratio = interval(np.array(td) / np.array(mc))
    assert [f"{x:#.3g}" for x in (interval(td), interval(mc), ratio)] == re.findall(r"[\d.]+ \[.*?\]", row)
    row = next(line for line in said.splitlines() if line.startswith("bootstraps from"))
    assert re.split(r" {2,}", row.strip()) == ["bootstraps from", "a target network"]

    train(monkeypatch, "seeds=[1,2,3]")  # the same folder, one more run
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert [command["cells"] for command in index["commands"]] == [2, 1]
    assert "seeds 1, 2, 3" in capsys.readouterr().out and list(Path("runs").iterdir()) == [out]
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "seeds 1, 2, 3" in report and "cells/s3_" in report
    (out / "report.md").unlink()
    assert report_anew(out).read_text(encoding="utf-8") == report
    assert "no run in it" not in report and "config.yaml" in {p.name for p in cells["s1"].iterdir()}


def test_a_run_of_a_seed_is_the_run_of_that_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, "seeds=[7]", f"run_dir={tmp_path / 'several'}")
    train(monkeypatch, "seed=7", f"run_dir={tmp_path / 'one'}")
    [several] = (tmp_path / "several" / "cells").iterdir()
    figures = [RunFolder(folder).results()["objectives"] for folder in (several, tmp_path / "one")]
    for name in ("td", "monte_carlo"):
        for one in figures:
            del one[name]["seconds"], one[name]["forward_equivalents"]
    assert figures[0] == figures[1]


def test_a_run_of_two_objectives_is_finished_with_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(monkeypatch, "seeds=[1]", f"run_dir={tmp_path}")
    [cell] = (tmp_path / "cells").iterdir()
    results = json.loads((cell / "results.json").read_text(encoding="utf-8"))
    assert cell_figures(cell)
    del results["objectives"]["monte_carlo"]  # as it stands between the two
    (cell / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert not cell_figures(cell)
    with pytest.raises(RunFolderError, match="no run is finished; the same command continues"):
        seeds_table(tmp_path)
    train(monkeypatch, "seeds=[1]", f"run_dir={tmp_path}")
    assert list(RunFolder(cell).results()["objectives"]) == ["td", "monte_carlo"]


def test_what_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"run_dir={tmp_path}"
    assert "seed and seeds are both given" in refused(monkeypatch, "seeds=[1]", "seed=1", where)
    assert "extend=9 is for one run, and several are asked for" in refused(
        monkeypatch, "seeds=[1]", "extend=9"
    )
    assert "seeds has 3 twice" in refused(monkeypatch, "seeds=[3,4,3]", where)
    train(monkeypatch, "seed=1", "compare=false", where)
    assert f"{tmp_path} holds a run, and not a comparison" in refused(monkeypatch, "seeds=[1]", where)
