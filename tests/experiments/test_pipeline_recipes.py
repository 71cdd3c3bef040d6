"""Experiments on few-step pipelines, composed onto tiny ones: distil, tune from the adapters, go on from the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl.configs.cli import settings
from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser
from diffrl.experiments.finetune import run_finetuning
from diffrl.finetuning.models.tuned import tuned_model
from tests.kit.configs import composed
from tests.kit.pipelines import stable_diffusion_3, z_image

SIZES = (
    "model.latent_size=8",
    "rollouts.at_once=4",
    "updates.micro_batch=4",
    "loop.iterations=1",
    "evaluation.samples=4",
    "evaluation.at_once=4",
)
GROUPS = ("rollouts.trajectories=8", "rollouts.group_size=4")


@pytest.fixture
def pipes(tmp_path: Path) -> Callable[[Callable[[], Any]], str]:
    """Writes a pipeline, and tells where."""

    def write(make: Callable[[], Any]) -> str:
        path = tmp_path / make.__name__
        if not path.exists():
            make().save_pretrained(path)
        return str(path)

    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\nred\n", encoding="utf-8")
    return write


def experiment(name: str, path: str, tmp_path: Path, *given: str) -> dict[str, Any]:
    words = [f"experiment={name}", f"model.path={path}", f"model.prompts_file={tmp_path / 'prompts.txt'}"]
    sizes = [*SIZES, *(GROUPS if "r1" in name else ("rollouts.trajectories=4",))]
    return settings(composed(*words, *sizes, *given, name="finetune"), [])


@pytest.mark.parametrize(
    ("name", "make"),
    [("sd35_tdm", stable_diffusion_3), ("sd35_tdm_r1", stable_diffusion_3), ("zimage_tdm_r1", z_image)],
)
def test_an_experiment_runs_on_a_tiny_pipeline(
    name: str, make: Callable[[], Any], pipes: Callable[[Any], str], tmp_path: Path
) -> None:
    """As it stands, in bfloat16 and with checkpointing; only sizes are smaller."""
    config = experiment(name, pipes(make), tmp_path, f"run_dir={tmp_path / 'run'}")
    folder = run_finetuning(config, progress=False)
    found = folder.results()["finetuning"]
    assert found["iteration"] == found["updates"] == 1 and found["queries"] == (8 if "r1" in name else 0)
    run = diffrl.load_tuned(folder.path)
    assert run.policy.grid.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert run.sample(2).shape == (2, 4, 8, 8)
    moved = [p for n, p in run.policy.denoiser.adapters.items() if ".lora_B." in n]
    assert all(bool(p.isfinite().all()) for p in moved) and any(bool(p.any()) for p in moved)
    assert {tuple(p.shape)[1] for p in moved} == {32}
    stock = make().to(torch.bfloat16)
    stock.load_lora_weights(folder.path / "lora")


def test_a_distilled_pipeline_is_tuned_on(pipes: Callable[[Any], str], tmp_path: Path) -> None:
    """By its exported adapters, or by its run with its fake score too: the teacher is the network without adapters."""
    path = pipes(stable_diffusion_3)
    exact = ("model.weights=float32", "dtype=float32", "optim.lr=1e-2")
    first = run_finetuning(
        experiment("sd35_tdm", path, tmp_path, *exact, f"run_dir={tmp_path / 'tdm'}"), progress=False
    )
    student = diffrl.load_tuned(first.path).policy.denoiser
    base = PipelineDenoiser.from_pipeline(
        stable_diffusion_3(),
        ["a cat", "two dogs", "red"],
        guidance_scale=1.0,
        max_sequence_length=128,
        even_levels=True,
    )
    x, t, cond = torch.randn(3, 4, 8, 8), torch.full((3,), 0.5), torch.arange(3)
    assert not torch.equal(student(x, t, cond), base(x, t, cond))

    adapters = f"model.adapters={first.path / 'lora'}"
    config = experiment("sd35_tdm_r1", path, tmp_path, *exact, adapters, f"run_dir={tmp_path / 'r1'}")
    second = run_finetuning(config, progress=False)
    assert second.results()["finetuning"]["queries"] == 8

    model = tuned_model(str(first.path))
    torch.testing.assert_close(model.denoiser(x, t, cond), student(x, t, cond), rtol=0, atol=0)
    assert model.teacher is not None and set(model.twins) == {"fake"}
    torch.testing.assert_close(model.teacher(x, t, cond), base(x, t, cond), rtol=1e-5, atol=1e-5)
    fake = model.twins["fake"](x, t, cond)
    assert not torch.equal(fake, student(x, t, cond)) and not torch.equal(fake, model.teacher(x, t, cond))
    itself = tuned_model(str(first.path), teacher="itself")
    assert itself.teacher is None and not itself.twins

    given = [
        "recipe=tdm_r1",
        "model=tuned",
        f"model.path={first.path}",
        "sampler=ddim",
        "policy.num_steps=4",
        "policy.std_floor=0",
        "reward=jpeg_compressibility",
        "heldout_reward=none",
        *[word for word in (*SIZES, *GROUPS) if not word.startswith("model")],
        f"run_dir={tmp_path / 'on'}",
    ]
    third = run_finetuning(settings(composed(*given, name="finetune"), []), progress=False)
    again = tuned_model(str(third.path))
    assert again.teacher is not None and set(again.twins) == {"fake"}
    torch.testing.assert_close(again.teacher(x, t, cond), base(x, t, cond), rtol=1e-5, atol=1e-5)
    assert not torch.equal(again.denoiser(x, t, cond), student(x, t, cond))


def test_adapters_without_a_rank_are_refused(tmp_path: Path) -> None:
    from diffrl.finetuning.models.pipeline import pipeline_model

    with pytest.raises(ValueError, match=r"model\.adapters are a LoRA: set model\.lora_rank"):
        pipeline_model("nowhere", prompts=["a"], adapters="lora", lora_rank=None, weights="float32")
