"""The snippets of docs/tour.md run as a reader would type them; those of another page are the objectives they name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.td import td_loss
from tests.kit.paths import ROOT

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")


def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", TOUR, re.DOTALL)
    names: dict[str, object] = {}
    shapes = []
    for snippet in snippets:
        exec(compile(snippet, "tour.md", "exec"), names)
        shapes.append(tuple(getattr(names.get("samples"), "shape", ())))
    assert len(snippets) == 6 and shapes == [(), (), (64, 16), (64, 16), (64, 2), (64, 2)]
    assert (tmp_path / "model.safetensors").is_file()
    assert len(names["rows"]) == 21


def test_targets_in_python_are_those_of_the_words_beside_them() -> None:
    page = (ROOT / "docs" / "when_bootstrapping_pays.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "when_bootstrapping_pays.md", "exec"), names)
    td, plain = td_loss(names["denoiser"]), monte_carlo_loss(names["denoiser"])
    diffrl.objectives.SoftUpdate(td, eps=0.97)
    chain = diffrl.sample_chain(names["process"], names["x0"], num_steps=14, coupling="markov")
    torch.testing.assert_close(names["td"](chain)["loss_value"], td(chain)["loss_value"])
    torch.testing.assert_close(names["fresh_states"], plain(names["states"])["loss_value"])
    torch.testing.assert_close(names["reference_batch"], plain(names["chain"])["loss_value"])
    assert names["td"].bootstrap == td.bootstrap == "target"
    assert len(names["states"]) == names["x_t"].shape[:2].numel()
