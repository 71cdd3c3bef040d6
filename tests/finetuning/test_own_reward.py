"""A reward and prompts of one's own on the command line: the file of the documentation, as it stands there."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.kit.paths import ROOT
from tests.kit.shell import Shell


@pytest.mark.slow
def test_the_documented_file_tunes_a_pipeline(shell: Shell, tmp_path: Path) -> None:
    from tests.kit.pipelines import stable_diffusion

    page = (ROOT / "docs" / "coming_from_ddpo.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    command = next(line.split() for line in page.splitlines() if "--import mine" in line)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    words = [f"model.path={tmp_path / 'pipe'}" if w.startswith("model.path=") else w for w in command[1:]]
    small = [
        *("model.weights=float32", "dtype=float32", "policy.num_steps=3", "rollouts.trajectories=4"),
        *("rollouts.at_once=2", "rollouts.overlap=true", "evaluation.samples=4", "updates.minibatches=2"),
        *("loop.iterations=2", "run_dir=run"),
    ]
    shell(*words, *small, folder=tmp_path)
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert found["config"]["reward"] == {"name": "red", "share": 2.0}
    assert found["finetuning"]["queries"] == 8
    assert load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert (tmp_path / "run" / "plots" / "summary.png").exists()
    refused = shell(*words, *small, "seed=3", "resume=run", folder=tmp_path, ok=False)
    assert refused.startswith("error:") and "seed" in refused
