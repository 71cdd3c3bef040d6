"""docs/adding_a_scheme.md is true: its files are written as they stand there, and its commands run."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl import registry
from diffrl.diffusion.networks.mlp import MLP
from diffrl.errors import InputError
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.value import ValueLoss
from diffrl.rewards import REWARDS
from tests.kit.configs import TINY
from tests.kit.paths import ROOT
from tests.kit.shell import Shell

PAGE = (ROOT / "docs" / "adding_a_scheme.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+)\.py`[^`]*?```python\n(.*?)```", PAGE, re.DOTALL))
TUNED = [
    *("--import", "mean_target", "model.path=my_run", "compare=[]", "policy.num_steps=4"),
    *("loop.iterations=2", "loop.eval_every=2", "evaluation.samples=16", "run_dir=tuned"),
]
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).splitlines()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's files define; what they register is forgotten afterwards."""
    for kind in (OBJECTIVES, REWARDS):
        monkeypatch.setattr(kind, "_entries", {e.name: e for e in kind.entries()})
    monkeypatch.setattr(registry, "_USERS", {})
    names: dict[str, Any] = {}
    for name, text in FILES.items():
        defined: dict[str, Any] = {"__name__": name}
        exec(compile(text, f"{name}.py", "exec"), defined)
        names |= defined
    return names


def test_the_page_has_all_files() -> None:
    assert list(FILES) == ["mean_target", "log_uniform", "my_rewards"]


def test_the_mean_of_equal_targets_is_each_of_them(page: dict[str, Any]) -> None:
    process = diffrl.EDM()
    denoiser = diffrl.Denoiser(MLP((2,), hidden=8, depth=1), process, sigma_data=0.5)
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    chain = diffrl.sample_chain(
        process, x0, num_steps=6, coupling="markov", generator=torch.Generator().manual_seed(1)
    )

    def loss(**options: Any) -> torch.Tensor:
        return page["mean_target_loss"](denoiser, **options)(chain)["loss_value"]

    td0 = ValueLoss(denoiser, n_steps=1)(chain)["loss_value"]
    torch.testing.assert_close(loss(n_steps=1), td0)
    assert not torch.isclose(loss(), td0, rtol=1e-3)
    label = OBJECTIVES.entry("mean_target").label_for({"n_steps": 4})
    assert label == "mean of 1 and 4 steps"
    with pytest.raises(InputError, match="n_steps is 0, but must be a whole number >= 1"):
        loss(n_steps=0)


@pytest.mark.parametrize("gamma", [1.0, 0.99])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_target_of_ones_own_arithmetic(gamma: float, hidden: bool) -> None:
    """With and without x0 in the chain, so with and without a reward; γ is the loss's."""
    defined: dict[str, Any] = {"__name__": "one_step"}
    exec(
        next(text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "OneStep" in text),
        defined,
    )
    denoiser = diffrl.Denoiser(MLP((2,), hidden=8), diffrl.EDM()).double()
    torch.nn.init.normal_(denoiser.network.last.weight)
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()
    chain = diffrl.sample_chain(diffrl.EDM(), x0, num_steps=6, generator=torch.Generator().manual_seed(1))
    chain = chain.exclude("x0") if hidden else chain
    own = ValueLoss(denoiser, gamma=gamma).make_value_estimator(defined["OneStep"])
    wanted = ValueLoss(denoiser, gamma=gamma, n_steps=1)(chain)["loss_value"]
    torch.testing.assert_close(own(chain)["loss_value"], wanted, rtol=1e-9, atol=0)


def test_what_an_objective_refuses_is_named_as_it_is_typed(page: dict[str, Any]) -> None:
    denoiser = diffrl.Denoiser(MLP((2,), hidden=8), diffrl.EDM())
    config = {
        "objective": {"name": "mean_target", "n_steps": 0},
        "starts": {"name": "uniform"},
        "chain": {"num_steps": 6, "coupling": 1.0},
    }
    with pytest.raises(InputError, match=r"^objective\.n_steps is 0"):
        build_objective(config, denoiser)
    config["objective"]["n_steps"], config["chain"]["num_steps"] = 2, 1
    with pytest.raises(InputError, match=r"^chain\.num_steps is 1: where the grid is shifted"):
        build_objective(config, denoiser)


def test_the_noise_levels_are_log_uniform(page: dict[str, Any]) -> None:
    states = page["log_uniform_states"](
        diffrl.EDM(), torch.zeros(10_000, 2), low=0.1, high=10.0, generator=torch.Generator().manual_seed(0)
    )
    u = states["t"].flatten().log10()
    assert -1 <= u.min() < -0.99 and 0.99 < u.max() <= 1
    assert abs(float(u.mean())) < 0.03 and float(u.std()) == pytest.approx(2 / 12**0.5, rel=0.03)


def test_the_reward_is_the_mean_of_a_sample(page: dict[str, Any]) -> None:
    x0 = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, -4.0]]])
    assert REWARDS.build({"name": "mine"})(x0, None).tolist() == page["mean"](x0).tolist() == [3.0, -1.0]


def test_registries_and_files_of_the_table_exist() -> None:
    rows = re.findall(r"\| `(diffrl\.\S+)\.([A-Z]+)` \| `(\S+)` \|", PAGE)
    assert len(rows) == PAGE.count("| `diffrl.")
    for module, name, file in rows:
        place = Path(str(import_module(module).__file__))
        assert isinstance(getattr(import_module(module), name), registry.Registry)
        assert f"{name}.register(" in (place.parent / file).read_text(encoding="utf-8"), file


def test_commands(shell: Shell, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    shown = []
    for line in COMMANDS:
        python, *words = shlex.split(line)
        assert python == "python"
        words += {"train": TINY, "compare": ["--cfg", "job"], "finetune": TUNED}.get(words[2], [])
        shown.append(shell(*words, folder=tmp_path))
    trained, _, uniform, _, compared = shown
    assert "mean of 1 and 4 steps and Monte Carlo on" in trained
    assert "Log-uniform denoising on" in uniform
    assert "objective=mean_target" in compared and (tmp_path / "my_run" / "results.json").exists()
    tuned = json.loads((tmp_path / "tuned" / "results.json").read_text(encoding="utf-8"))
    assert tuned["config"]["reward"] == {"name": "mine"} and tuned["finetuning"]["iteration"] == 2
