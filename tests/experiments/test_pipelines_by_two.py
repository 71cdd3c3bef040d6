"""Two processes tune a pipeline of diffusers as one: adapters, moments, rewards of prompts, a group that is split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from diffrl.configs.cli import settings
from diffrl.experiments.finetune import run_finetuning
from tests.experiments.test_tuning_by_two import assert_near
from tests.kit.configs import composed
from tests.kit.pairs import in_pair
from tests.kit.pipelines import PROMPTS, stable_diffusion
from tests.kit.run_states import state

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

ADAPTERS = "pytorch_lora_weights.safetensors"
# 3 groups of 3 trajectories, one for each prompt: 4 for one process, 5 for the other
WORDS = (
    *("recipe=ddpo_is", "model=pipeline", "sampler=ancestral", "compare=[]"),
    *("reward=jpeg_compressibility", "heldout_reward=none"),
    *("model.lora_rank=4", "model.guidance_scale=5", "model.weights=float32"),
    *("credit=group", "rollouts.group_size=3", "rollouts.trajectories=9", "rollouts.at_once=6"),
    *("policy.num_steps=3", "updates.minibatches=2", "updates.micro_batch=2", "optim.lr=1e-2"),
    *("optim.warmup_steps=0", "loop.iterations=2", "loop.eval_every=2", "evaluation.samples=6"),
)


def config_of(folder: Path, name: str) -> dict[str, Any]:
    places = (f"model.path={folder}/pipe", f"model.prompts_file={folder}/prompts.txt")
    return settings(composed(*WORDS, *places, f"run_dir={folder}/{name}", name="finetune"), [])


def tuned(folder: Path, name: str) -> list[list[str]]:
    """Tune towards light for one prompt and dark for the others; the prompts of each call."""
    asked = list[list[str]]()

    def light_or_dark(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(list(prompts))
        signs = [1.0 if prompt == PROMPTS[0] else -1.0 for prompt in prompts]
        return images.mean((1, 2, 3)) * images.new_tensor(signs)

    run_finetuning(config_of(folder, name), reward=light_or_dark, progress=False)
    return asked


def work(rank: int, folder: Path, meet: Callable[[], None]) -> None:
    """What each of the two does."""
    meet()
    (folder / f"asked{rank}.json").write_text(json.dumps(tuned(folder, "two")), encoding="utf-8")


def test_two_processes_tune_a_pipeline_as_one(tmp_path: Path) -> None:
    """Adapters, their moments and files, samples and every figure, in float32; each asks about its rows alone."""
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    assert in_pair(work, tmp_path, meetings=1) == [0, 0]
    alone = tuned(tmp_path, "one")
    asked = [json.loads((tmp_path / f"asked{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    shares = [[call for call in asked[rank] if len(call) == size] for rank, size in ((0, 4), (1, 5))]
    for whole, first, second in zip([c for c in alone if len(c) == 9], *shares, strict=True):
        assert [*first, *second] == whole and first[-1] == second[0] == second[1]  # a group lies on both
    assert len(shares[0]) == 2
    assert_near(state(tmp_path / "two"), state(tmp_path / "one"))
    two, one = (load_file(tmp_path / name / "lora" / ADAPTERS) for name in ("two", "one"))
    assert_near(two, one)
    assert all(float(x.abs().max()) > 1e-2 for name, x in one.items() if "lora_B" in name)  # which begin at 0
