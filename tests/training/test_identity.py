"""What a checkpoint belongs to: differences are named and refused, and a word of its own allows each kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.synthetic import rings
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, list_checkpoints, load_checkpoint
from diffrl.training.identity import RunChanged, fingerprint, refuse_changes
from diffrl.training.lock import FolderInUse
from diffrl.training.optim import Optim
from tests.kit.trainers import differing, make, state, take

CONSTANT = Optim(lr=2e-3, warmup_steps=2, decay="none")

# The comparison


def told(kept: dict[str, Any], now: dict[str, Any], **words: bool) -> str:
    with pytest.raises(RunChanged) as refused:
        refuse_changes(kept, now, of="step_000005", steps="trainer.grad_steps", **words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_difference_is_named_with_both_values() -> None:
    said = told({"optim.lr": 0.1, "seed": 0, "data.name": "gmm"}, {"optim.lr": 0.2, "seed": 0})
    assert "optim.lr 0.1 → 0.2, data.name 'gmm' → 'nothing'" in said and "seed" not in said
    assert "accept_changes" in said


def test_equal_facts_and_new_options_pass() -> None:
    kept = {"optim.betas": [0.9, 0.99], "seed": 0}
    refuse_changes(kept, {"optim.betas": (0.9, 0.99), "seed": 0, "optim.new": 1}, of="", steps="")
    refuse_changes({}, {"seed": 0}, of="", steps="")  # from before checkpoints knew


def test_more_steps_have_a_word_of_their_own_and_fewer_have_not() -> None:
    kept, more = {"trainer.grad_steps": 10, "seed": 0}, {"trainer.grad_steps": 20, "seed": 0}
    assert "trainer.grad_steps 10 → 20; to train on for more steps, say `extend`" in told(kept, more)
    refuse_changes(kept, more, of="", steps="trainer.grad_steps", extend=True)
    assert "grad_steps 20 → 10; take that back" in told(more, kept, extend=True)
    said = told(kept, {**more, "seed": 1}, extend=True)
    assert "seed 0 → 1" in said and "grad_steps" not in said


@pytest.mark.parametrize(
    "other",
    [torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 2.5]), torch.zeros(0)],
)
def test_fingerprints_tell_shapes_dtypes_and_bits(other: Tensor) -> None:
    x = torch.tensor([1.0, 2.0])
    assert fingerprint([x]) == fingerprint([torch.stack([x, x], 1)[:, 0]]) != fingerprint([other])
    assert fingerprint([x, x]) != fingerprint([x]) and len(fingerprint([x])) == 16
    assert fingerprint([torch.tensor(True)]) != fingerprint([torch.tensor(1, dtype=torch.uint8)])


# Trainings in Python


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    take(make(tmp_path), 6)
    more = rings(test_size=16)
    other = Data("rings", more.test, train=torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
    for changed, says in (
        (make(tmp_path, seed=1), "seed 0 → 1"),
        (make(tmp_path, optim=Optim(lr=0.5)), "optim.lr 0.002 → 0.5"),
        (make(tmp_path, data=other), f"data.fingerprint '{more.fingerprint}' → '{other.fingerprint}'"),
        (make(tmp_path, {"lmbda": 0.25}), "objective.lookahead 0.125 → 'nothing'"),
        (make(tmp_path, label_dropout=0.3), "trainer.label_dropout 0.1 → 0.3"),
    ):
        before = state(changed)
        with pytest.raises(RunChanged, match="step_000005 belongs to a run that is not this one") as refused:
            changed.resume()
        assert says in str(refused.value)
        assert differing(before, state(changed)) == []  # nothing was taken over
    assert make(tmp_path, seed=1).resume(accept_changes=True)


def test_extended_is_as_long_from_the_start_where_no_schedule_knows_the_length(tmp_path: Path) -> None:
    short = make(tmp_path, optim=CONSTANT)
    take(short, 99)
    assert short.step == 12
    with pytest.raises(RunChanged, match="say `extend`"):
        make(tmp_path, grad_steps=20, optim=CONSTANT).resume()
    longer = make(tmp_path, grad_steps=20, optim=CONSTANT)
    assert longer.resume(extend=True) and longer.step == 12
    figures = take(longer, 99)
    whole = make(grad_steps=20, optim=CONSTANT)
    assert take(whole, 99)[12:] == figures and differing(state(whole), state(longer)) == []
    again = make(tmp_path, grad_steps=20, optim=CONSTANT)
    assert again.resume() and again.step == 20  # its checkpoints know the new length


def test_extended_follows_the_learning_rate_of_the_new_length(tmp_path: Path) -> None:
    optim = Optim(lr=0.01, warmup_steps=2, decay="cosine")
    take(make(tmp_path, optim=optim), 99)
    longer = make(tmp_path, grad_steps=20, optim=optim)
    longer.resume(extend=True)
    rates = [figures["lr"] for figures in take(longer, 99)]
    assert rates == pytest.approx([optim.lr * optim.factor(step, 20) for step in range(12, 20)])


def test_another_number_of_threads_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(make(tmp_path), 6)
    threads = torch.get_num_threads()
    assert load_checkpoint(tmp_path / "step_000005").versions["threads"] == threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    with pytest.warns(RuntimeWarning, match=rf"threads {threads} → {threads + 3}\): .*last bits") as said:
        assert make(tmp_path).resume()
    assert len(said) == 1 and "\n" not in str(said[0].message)


def rewrite(path: Path, drop_key: str | None = None, drop_set: str | None = None) -> None:
    """The checkpoint again without a part, and with a manifest that fits."""
    from diffrl.training.checkpoints import save_checkpoint

    read = load_checkpoint(path)
    save_checkpoint(
        path.parent,
        read.step,
        weights={k: v for k, v in read.weights.items() if k != drop_set},
        training={k: v for k, v in read.training.items() if k != drop_key},
        keep=9,
        identity=read.identity,
    )


@pytest.mark.parametrize(
    "part",
    [{"drop_set": "ema"}, {"drop_set": "model"}, {"drop_key": "optimiser"}, {"drop_key": "seconds"}],
)
def test_a_checkpoint_that_lacks_a_part_is_named(tmp_path: Path, part: dict[str, str]) -> None:
    take(make(tmp_path), 6)
    rewrite(tmp_path / "step_000005", **part)
    with pytest.raises(
        CheckpointError, match=f"step_000005 .*lacks a part of it .*{next(iter(part.values()))}"
    ):
        make(tmp_path).resume()


# The folder


def test_what_a_kill_left_is_swept_when_training_goes_on(tmp_path: Path) -> None:
    first = make(tmp_path)
    take(first, 99)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step_000012"
    (tmp_path / "step_000005").mkdir()  # one too many: the kill came before it was discarded
    (tmp_path / "step_000004.tmp-discarded").mkdir()
    again = make(tmp_path)
    again.resume()
    take(again, 99)  # nothing is left to train
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_000012"]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = make(tmp_path).steps()
    next(first)
    with pytest.raises(FolderInUse, match="is being written by process"):
        take(make(tmp_path), 1)
    del first
    assert len(take(make(tmp_path), 1)) == 1


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_seed_that_cannot_be(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}, but must be a whole number >= 0"):
        make(seed=seed)
