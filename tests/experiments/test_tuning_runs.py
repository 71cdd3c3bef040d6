"""Fine-tuning runs from configurations: folders, resuming, comparing, the command line, pipelines, bad input."""

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

import diffrl
from diffrl.configs.cells import base_run, plan_finetuning
from diffrl.configs.cli import settings
from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser
from diffrl.experiments.comparison import run_cells
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.method_findings import MethodFindings
from diffrl.experiments.reports.finetuning import methods_table, write_methods_report
from diffrl.experiments.train import run_experiment
from diffrl.finetuning.build import build_recipe
from diffrl.finetuning.checks import UNTAUGHT
from diffrl.finetuning.methods.registry import METHODS
from diffrl.metrics.distances import sample_distance
from diffrl.rewards.calls import RewardError
from diffrl.rewards.mode_distance import ModeDistance
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.training.table import Table
from tests.kit.configs import FINETUNING, SMALL, composed, small
from tests.kit.paths import EXAMPLES

EXAMPLE = EXAMPLES / "finetune_reward.py"
QUICK = (
    "reward=mode_distance",
    "reward.point=[0.8,0]",
    "heldout_reward=none",
    "policy.num_steps=4",
    "rollouts.trajectories=16",
    "loop.iterations=6",
    "loop.eval_every=2",
    "loop.checkpoint_every=2",
    "evaluation.samples=32",
)


TO_BASE = "distance_to_base_sliced_w2@32_seed3141592"
DISTANCE = "| distance to base (sliced W2 distance of 32 samples, seed 3141592) |"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser of a 2-D set, hardly trained."""
    path = tmp_path_factory.mktemp("base") / "run"
    run_experiment(small("compare=false", f"run_dir={path}"), progress=False)
    return path


def quick(base: Path, *overrides: str) -> dict[str, Any]:
    chosen = {override.partition("=")[0] for override in overrides}
    words = [w for w in QUICK if w.partition("=")[0] not in chosen and w.partition(".")[0] not in chosen]
    return settings(composed(*words, f"model.path={base}", *overrides, name="finetune"), [])


def tuned_weights(path: Path) -> Tensor:
    return torch.cat([p.detach().flatten() for p in diffrl.load_tuned(path).policy.parameters()])


@pytest.mark.parametrize("recipe", METHODS)
def test_recipes_by_configuration_are_those_of_python(recipe: str) -> None:
    published = (f"rollouts.trajectories={METHODS[recipe]().rollouts.trajectories}", "model.path=x")
    config = OmegaConf.to_container(composed(f"recipe={recipe}", *published, name="finetune"), resolve=True)
    assert isinstance(config, dict) and build_recipe(config) == METHODS[recipe]()


@pytest.mark.parametrize("name", sorted(FINETUNING))
def test_every_fine_tuning_experiment_composes(name: str) -> None:
    config = settings(composed(f"experiment={name}", "model.path=x", name="finetune"), [])
    recipe = build_recipe(config)
    assert recipe.updates.micro_batch >= 8 and config["policy"]["reduction"] == "mean"
    for method in config["compare"]:
        assert method in config["methods"]


def test_a_run_leaves_a_folder_that_can_be_understood(base: Path, tmp_path: Path) -> None:
    folder = run_finetuning(quick(base, f"run_dir={tmp_path / 'run'}", "recipe=sdpo"), progress=False)
    assert {f.name for f in folder.path.iterdir()} >= {
        "config.yaml",
        "versions.json",
        "command.txt",
        "metrics.csv",
    }
    found = folder.results()["finetuning"]
    assert found["iteration"] == 6 and found["trajectories"] == 96 and found["updates"] == 6 * 2 * 4
    assert (
        set(found["base"]) == set(found["final"])
        and found["base"]["kl_to_base"] == 0 < found["final"]["kl_to_base"]
    )
    rows = Table(folder.path / "metrics.csv", ()).rows()
    assert [row["iteration"] for row in rows] == [str(i) for i in range(7)]
    assert [bool(row["eval_reward"]) for row in rows] == [True, False, True, False, True, False, True]
    assert found["untaught"] is None
    samples = folder.samples()
    assert samples["base"]["4"].shape == samples["tuned"]["4"].shape == (32, 2)
    by_hand = sample_distance("sliced_w2", samples["tuned"]["4"], samples["base"]["4"])
    assert [k for k in rows[0] if k.startswith("distance")] == [TO_BASE]
    assert found["final"][TO_BASE] == float(rows[-1][TO_BASE]) == pytest.approx(by_hand, rel=1e-5)

    run = diffrl.load_tuned(folder.path)
    torch.testing.assert_close(run.sample(8, seed=5)[3:4], run.sample(1, seed=8))
    assert run_finetuning({**folder.config(), "resume": str(folder.path)}, progress=False).path == folder.path


@pytest.mark.parametrize("recipe", ["ddpo_is", "sdpo"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    recipe: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_finetuning(quick(base, f"run_dir={tmp_path / 'whole'}", f"recipe={recipe}"), progress=False)
    from diffrl.experiments.run import Interrupted
    from diffrl.finetuning.finetuner import Finetuner

    fit = Finetuner.fit
    monkeypatch.setattr(
        Finetuner,
        "fit",
        lambda self, **options: fit(self, **{**options, "stop": lambda: self.step == 3}),
    )
    config = quick(base, f"run_dir={tmp_path / 'part'}", f"recipe={recipe}")
    with pytest.raises(Interrupted, match=r"stopped after iteration 3, and saved; continue with resume="):
        run_finetuning(config, progress=False)
    monkeypatch.undo()
    table = tmp_path / "part" / "metrics.csv"  # as earlier versions wrote it
    table.write_text(table.read_text(encoding="utf-8").replace(TO_BASE, "distance_to_base"), encoding="utf-8")
    part = run_finetuning({**config, "run_dir": None, "resume": str(tmp_path / "part")}, progress=False)
    assert torch.equal(tuned_weights(whole.path), tuned_weights(part.path))
    assert part.results()["finetuning"]["base"] == whole.results()["finetuning"]["base"]
    one, other = (Table(f.path / "metrics.csv", ()).rows() for f in (whole, part))
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in one] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in other
    ]


def test_a_run_stops_early_by_choice_and_stays_stopped(base: Path, tmp_path: Path) -> None:
    config = quick(base, f"run_dir={tmp_path / 'run'}", "stop.max_kl=1e-9")
    folder = run_finetuning(config, progress=False)
    found = folder.results()["finetuning"]
    assert found["iteration"] == 2 and "is above stop.max_kl=1e-09" in found["stopped_early"]
    (folder.path / "results.json").unlink()
    again = run_finetuning({**config, "resume": str(folder.path)}, progress=False)
    assert again.results()["finetuning"]["iteration"] == 2


def test_a_reward_of_ones_own(base: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def mine(x0: Tensor, cond: Any) -> Tensor:
        asked.append(len(x0))
        return x0[:, 1]

    config = quick(base, f"run_dir={tmp_path / 'run'}")
    folder = run_finetuning(config, reward=mine, heldout=lambda x0, cond: x0[:, 0], progress=False)
    assert asked and "heldout_reward" in folder.results()["finetuning"]["final"]
    (folder.path / "results.json").unlink()
    resumed = {**folder.config(), "resume": str(folder.path)}
    with pytest.raises(
        ValueError, match="tuned for a reward of your own, mine: give it to run_finetuning again"
    ):
        run_finetuning(resumed, progress=False)
    again = run_finetuning(
        {**config, "run_dir": None, "resume": str(folder.path)},
        reward=mine,
        heldout=lambda x0, cond: x0[:, 0],
        progress=False,
    )
    assert again.results()["finetuning"]["iteration"] == 6


# Comparing


def words(base: Path) -> list[str]:
    return [*QUICK, f"model.path={base}", "seeds=[0,1]", "loop.iterations=2"]


def cells(base: Path, *more: str) -> list[Any]:
    given = [*words(base), *more]
    config = settings(composed(*given, name="finetune"), [])
    return plan_finetuning(config, given, str(base))


@pytest.mark.usefixtures("unrendered")
def test_methods_are_run_once_and_reported_by_seed(base: Path, tmp_path: Path) -> None:
    done = run_cells(cells(base), tmp_path, workers=0, progress=False)
    assert (done.finished, done.total, done.failed, done.interrupted) == (6, 6, {}, False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("cells/*/results.json")}
    assert run_cells(cells(base), tmp_path, workers=0, progress=False).finished == 6
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("cells/*/results.json")}

    table = sorted(tmp_path.glob("cells/*/metrics.csv"))[0]  # as earlier versions wrote it
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace(TO_BASE, "distance_to_base"), encoding="utf-8")
    report = re.sub(" +", " ", write_methods_report(tmp_path).read_text(encoding="utf-8"))
    tuning = MethodFindings(tmp_path)
    assert [m.name for m in tuning.methods] == ["DDPO-SF", "DDPO-IS", "SDPO"]
    assert tuning.common("trajectories") == 32 and tuning.common("queries") == 32
    assert tuning.common("updates") == 2  # of DDPO-SF
    sdpo = tuning.methods[2]
    x, y = sdpo.curve("eval_reward", "updates")
    assert x.tolist() == [0, 16] and y.shape == (2, 2)
    by_hand = [(1 - 2 / 16) * rows[0]["eval_reward"] + 2 / 16 * rows[1]["eval_reward"] for rows in sdpo.rows]
    assert sdpo.at("eval_reward", "updates", 2) == pytest.approx(by_hand)
    for word in (
        "| DDPO-SF |",
        "32 trajectories",
        "2 optimiser updates",
        "before_and_after.png",
        "| base |",
        DISTANCE,
    ):
        assert word in report
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["methods"]["SDPO"]["final"]["eval_reward"]) == 2
    assert all(
        (tmp_path / "figures" / f"reward_by_{axis}.png").stat().st_size for axis in ("queries", "updates")
    )


@pytest.mark.usefixtures("unrendered")
def test_a_method_more_keeps_what_was_run(base: Path, tmp_path: Path) -> None:
    run_cells(cells(base, "compare=[DDPO-SF]"), tmp_path, workers=0, progress=False)
    more = cells(base, "compare=[DDPO-SF,mine]", "+methods.mine=['recipe=ddpo_is']")
    assert run_cells(more, tmp_path, workers=0, progress=False).finished == 4


def test_workers_may_have_workers_for_the_reward(base: Path, tmp_path: Path) -> None:
    some = cells(base, "compare=[DDPO-SF]", "reward_calls.workers=1", "reward_calls.backend=process")[:1]
    done = run_cells(some, tmp_path, workers=1, progress=False)
    assert done.failed == {} and done.finished == 1


@pytest.mark.usefixtures("unrendered")
def test_a_failed_run_is_listed_and_runs_again(base: Path, tmp_path: Path) -> None:
    bad = [cell for cell in cells(base, "compare=[SDPO]") if cell.where["seed"] == 0]
    broken = {
        **bad[0].config,
        "reward": {"name": "faulty", "kind": "exception", "calls": None, "seconds": 1.0},
    }
    done = run_cells([replace(bad[0], config=broken)], tmp_path, workers=0, progress=False)
    assert done.finished == 0 and "this reward is faulty" in done.failed["SDPO, seed 0"]
    with pytest.raises(RunFolderError, match="no run is finished"):
        write_methods_report(tmp_path)
    assert MethodFindings(tmp_path).unfinished()[0].where == {"method": "SDPO", "seed": 0}
    assert run_cells(bad, tmp_path, workers=0, progress=False).finished == 1


def test_another_configuration_is_another_cell(base: Path, tmp_path: Path) -> None:
    one, other = (cells(base, "compare=[DDPO-SF]", f"optim.lr={lr}")[0] for lr in (1e-3, 2e-3))
    [same] = [cell for cell in cells(base, "compare=[DDPO-SF]", "optim.lr=1e-3", "seeds=[0]", "workers=5")]
    assert one.identity == same.identity != other.identity
    for cell in (one, other, same):
        assert run_cells([cell], tmp_path, workers=0, progress=False).finished == 1
    assert len(list(tmp_path.glob("cells/*/results.json"))) == 2
    assert [command["cells"] for command in MethodFindings(tmp_path).commands] == [1, 1, 0]


def test_what_is_tuned_is_trained_once(tmp_path: Path) -> None:
    pretrain = [word for word in SMALL if word != "trainer.grad_steps=30"] + ["trainer.grad_steps=10"]
    path = base_run(pretrain, tmp_path, progress=False)
    trained = RunFolder(path).results()["objectives"]["td"]["seconds"]
    assert base_run(pretrain, tmp_path, progress=False) == path
    assert RunFolder(path).results()["objectives"]["td"]["seconds"] == trained
    with pytest.raises(ValueError, match=r"pretrain: .*'trainer.grad_step'"):
        base_run(["trainer.grad_step=1"], tmp_path, progress=False)


@pytest.mark.usefixtures("unrendered")
def test_the_example(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shell(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *given])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    common = [*words(base), f"out={tmp_path / 'out'}", "workers=0"]
    out = shell(*common, "compare=[DDPO-IS,SDPO]", "seeds=[0]")
    assert "reward, held-out noise" in out and f"report  {tmp_path / 'out' / 'report.md'}" in out
    out = shell(*common, "compare=[]", f"run_dir={tmp_path / 'single'}", "recipe=ddpo_sf")
    assert "Reinforce(" in out and "KL to itself" in out and f"run folder  {tmp_path / 'single'}" in out
    assert "nothing is learned" not in out and "tuned" in shell(f"resume={tmp_path / 'single'}")


@pytest.mark.parametrize("method", ["DDPO-IS", "SDPO"])
@pytest.mark.usefixtures("unrendered")
def test_a_constant_reward_is_told_at_the_start_and_at_the_end(
    method: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ModeDistance, "__call__", lambda self, x0, cond=None: torch.full((len(x0),), 0.3))
    compared = cells(base, f"compare=[{method}]", "seeds=[4]")
    assert run_cells(compared, tmp_path / "out", workers=0, progress=False).finished == 1
    line = f"{method}, seed 4: in each of 2 iterations {UNTAUGHT}\n"
    report = write_methods_report(tmp_path / "out").read_text(encoding="utf-8")
    assert report.count(line) == methods_table(tmp_path / "out").count(line) == 1

    own = ["compare=[]", f"run_dir={tmp_path / 'run'}", f"recipe={method.lower().replace('-', '_')}"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words(base), *own])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    start, end = capsys.readouterr().out.split("tuned")
    assert start.count(UNTAUGHT) == 1 and f"\nin each of 2 iterations {UNTAUGHT}\n" in end
    assert RunFolder(tmp_path / "run").results()["finetuning"]["untaught"]


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ([], "ddpo_is"),
        (["recipe=flow_grpo", "rollouts.trajectories=24"], "flow_grpo"),  # of the surrogate that DDPO has
        (["surrogate=reinforce", "updates.minibatches=1"], "reinforce"),
    ],
)
@pytest.mark.usefixtures("unrendered")
def test_a_folder_is_named_by_the_recipe(
    given: list[str], method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words(base), "compare=[]", "loop.iterations=1", *given])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    [folder] = (tmp_path / "runs").iterdir()
    assert f"_{method}_mode_distance_s0" in folder.name and "ppo_clip" not in folder.name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["compare=[DPO]"], "compare: no method 'DPO': there are DDPO-SF, DDPO-IS, SDPO"),
        (["rewards=ink"], "rewards"),
        (["reward.point=[1,2,3]"], "the point has 3 numbers"),
        (["model.path=nowhere", "compare=[]"], "nowhere holds no run"),
        (["sampler=heun", "compare=[]"], "steps without a law"),
        (["sampler=euler", "policy.std_floor=0", "compare=[]"], "no step of the policy is stochastic"),
        (["updates.order=step", "recipe=ddpo_sf", "compare=[]"], "on-policy"),
        (["model.labels=[1]", "compare=[]"], "trained without labels"),
    ],
)
@pytest.mark.usefixtures("unrendered")
def test_a_mistake_is_one_line(
    given: list[str],
    says: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = {word.partition("=")[0] for word in given}
    usual = [word for word in words(base) if word.partition("=")[0] not in chosen]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *usual, f"out={tmp_path}", "workers=0", *given])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = str(stop.value)
    assert said.startswith("error: ") and "\n" not in said
    assert says in said + capsys.readouterr().out  # what failed in a cell is listed above


def test_a_reward_that_fails_ends_the_run_with_its_name(base: Path, tmp_path: Path) -> None:
    config = quick(base, f"run_dir={tmp_path / 'run'}", "reward=faulty", "reward.kind=nan")
    with pytest.raises(RewardError, match="Faulty"):
        run_finetuning(config, progress=False)
    assert not (tmp_path / "run").exists()
    stands_in = quick(base, f"run_dir={tmp_path / 'run'}", "reward=faulty", "reward_calls.on_failure=mean")
    with pytest.warns(RuntimeWarning, match="stands in"):
        folder = run_finetuning(stands_in, progress=False)
    assert folder.results()["finetuning"]["iteration"] == 6


# Pipelines


def test_a_pipeline_is_tuned_by_configuration(tmp_path: Path) -> None:
    from tests.kit.pipelines import stable_diffusion

    stable_diffusion().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a cat\n\ntwo dogs\n", encoding="utf-8")
    given = [
        "experiment=sd15_ddpo",
        f"model.path={tmp_path / 'pipe'}",
        f"model.prompts_file={tmp_path / 'prompts.txt'}",
        "model.weights=float32",
        "dtype=float32",
        "policy.num_steps=3",
        "rollouts.trajectories=4",
        "rollouts.at_once=2",
        "evaluation.samples=4",
        "updates.minibatches=2",
        "loop.iterations=2",
        f"run_dir={tmp_path / 'run'}",
    ]
    config = settings(composed(*given, name="finetune"), [])
    seen: list[Any] = []

    def bright(images: Tensor, prompts: Any) -> Tensor:
        seen.append((images.shape[1:], set(prompts)))
        return images.mean((1, 2, 3))

    folder = run_finetuning(config, reward=bright, progress=False)
    found = folder.results()["finetuning"]
    assert found["queries"] == 8 and found["updates"] == 4
    assert {prompt for _, prompts in seen for prompt in prompts} == {"a cat", "two dogs"}
    assert all(shape[0] == 3 for shape, _ in seen)
    both = WeightedSum({"bright": (bright, 1.0), "dark": (bright, -0.5)}, normalise="running")
    seen.clear()
    summed = run_finetuning({**config, "run_dir": str(tmp_path / "sum")}, reward=both, progress=False)
    assert summed.results()["finetuning"]["queries"] == 16 and {shape[0] for shape, _ in seen} == {3}

    run = diffrl.load_tuned(folder.path)
    assert all("lora" in name for name in run.policy.denoiser.trainable_state())
    assert run.sample(2).shape[0] == 2

    stock = stable_diffusion()
    stock.load_lora_weights(folder.path / "lora")
    loaded = PipelineDenoiser.from_pipeline(stock, ["a cat", "two dogs"], guidance_scale=5.0)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.tensor([0, 1])
    torch.testing.assert_close(loaded(x, t, cond), run.policy.denoiser(x, t, cond), rtol=1e-5, atol=1e-5)
    for pictures in (folder.samples()["base"], folder.samples()["tuned"]):
        assert [tuple(images.shape) for images in pictures.values()] == [(4, 3, 16, 16)]
    for name in ("base", "tuned"):
        (images,) = folder.samples()[name].values()
        for number, x in enumerate(images):
            with Image.open(folder.path / "pictures" / f"{name}_{number:02d}.png") as picture:
                pixels = torch.as_tensor(np.array(picture)).permute(2, 0, 1)
            torch.testing.assert_close(pixels / 127.5 - 1, x.clamp(-1, 1), rtol=0, atol=0.5 / 127.5 + 1e-6)
    prompts = (folder.path / "pictures" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == ["a cat", "two dogs", "a cat", "two dogs"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": None}, "model.path is null"),
        ({"prompts": []}, "give model.prompts, model.prompts_file or model.prompts_from"),
        ({"weights": "int8"}, "model.weights is 'int8'"),
        ({"lora_rank": None}, "set model.weights=float32, or model.lora_rank"),
        ({"prompts": [], "prompts_file": "nowhere.txt"}, "model.prompts_file nowhere.txt cannot be read"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    from diffrl.finetuning.models.pipeline import pipeline_model

    given = {"path": "nowhere", "prompts": ["a cat"], **options}
    with pytest.raises(ValueError, match=says):
        pipeline_model(given.pop("path"), **given)
