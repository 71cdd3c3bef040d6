"""GenEval's rules on detections that are written down, and the reward on pictures of coloured boxes."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl import registry
from diffrl.finetuning.prompts import prompts_of
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.by_name import DETECTORS
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.geneval import GenEval
from diffrl.rewards.geneval_rules import Detection, clearly_right, graded, positions, published, task_of
from diffrl.rewards.weighted_sum import nondeterminism

TAU = 0.1


def things(label: str, *colours: str | None, x: float = 0, y: float = 0) -> dict[str, list[Detection]]:
    """Objects of one class in one place, the surest first."""
    box = (x, y, x + 10, y + 10)
    return {label: [Detection(label, 0.99 - i / 100, box, c) for i, c in enumerate(colours)]}


def clause(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


def asks(*include: dict[str, Any], exclude: Any = (), tag: str = "two_object") -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def dogs(n: int) -> dict[str, list[Detection]]:
    return things("dog", *[None] * n)


TWO_DOGS = asks(clause("dog", 2), exclude=[clause("dog", 3)])
RED_DOG = asks(clause("dog", color="red"))
TWO_RED_DOGS = asks(clause("dog", 2, color="red"))
LEFT = asks(clause("cat"), clause("dog", position=["left of", 0]))
RED_LEFT = asks(clause("cat", color="blue"), clause("dog", color="red", position=["left of", 0]))
CAT, DOG_LEFT, DOG_RIGHT = things("cat", None, x=100), things("dog", None), things("dog", None, x=200)
BLUE_CAT = things("cat", "blue", x=100)


@pytest.mark.parametrize(
    ("found", "metadata", "graded_", "strict", "benchmark"),
    [
        ({}, asks(clause("dog")), 0, 0, 0),
        ({}, TWO_DOGS, 0, 0, 0),
        (dogs(1), TWO_DOGS, 1 / 2, 0, 0),
        (dogs(2), TWO_DOGS, 1, 1, 1),
        (dogs(3), TWO_DOGS, 1 / 2, 0, 0),  # the benchmark's exclusion
        (dogs(3), asks(clause("dog", 2)), 1 / 2, 0, 1),  # nothing is excluded: more cost nothing
        (dogs(5), asks(clause("dog")), -3, 0, 1),
        (dogs(1), asks(clause("dog"), clause("cat")), 1 / 2, 0, 0),
        (dogs(1) | things("cat", None), asks(clause("dog"), clause("cat")), 1, 1, 1),
        (dogs(1) | things("cow", None), asks(clause("dog")), 1, 1, 1),  # what nobody asked for
        (things("dog", "red"), RED_DOG, 1, 1, 1),
        (things("dog", "blue"), RED_DOG, 1 / 2, 0, 0),
        ({}, RED_DOG, 0, 0, 0),
        (things("dog", "red", "blue"), RED_DOG, 0, 0, 1),  # the surest is red
        (things("dog", "blue", "red"), RED_DOG, 0, 0, 0),  # the surest is not
        (things("dog", "red", "blue"), TWO_RED_DOGS, (1 + 1 / 2) / 2, 0, 0),
        (things("dog", "red", "red"), TWO_RED_DOGS, 1, 1, 1),
        (CAT | DOG_LEFT, LEFT, 1, 1, 1),
        (CAT | DOG_RIGHT, LEFT, 3 / 4, 0, 0),  # parts 1, 1, 0 and, as published, 1
        (DOG_LEFT, LEFT, (0 + 1 + 0) / 3, 0, 0),  # no cat to be left of
        (CAT, LEFT, (1 + 0 + 0) / 3, 0, 0),
        (BLUE_CAT | things("dog", "red"), RED_LEFT, 1, 1, 1),
        (
            BLUE_CAT | things("dog", "green"),
            RED_LEFT,
            (1 + 1 + 1 + 0) / 4,
            0,
            0,
        ),  # its position is not looked at
        (things("cat", "red", x=100) | things("dog", "red"), RED_LEFT, (1 + 0 + 1 + 1 + 0) / 5, 0, 0),
    ],
)
def test_rules(
    found: dict[str, list[Detection]], metadata: dict[str, Any], graded_: float, strict: int, benchmark: int
) -> None:
    task = task_of(metadata)
    assert graded(found, task, TAU) == pytest.approx(graded_)
    assert clearly_right(found, task, TAU) == bool(strict)
    assert published(found, task, TAU) == bool(benchmark)


def test_strict_implies_published_and_a_full_mark() -> None:
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        found: dict[str, list[Detection]] = {}
        for label in ("cat", "dog"):
            places = draw.integers(0, 60, (draw.integers(0, 3), 2))
            colours = draw.choice(["red", "blue"], len(places))
            found[label] = [
                Detection(label, 0.9 - i / 10, (x, y, x + 20, y + 20), str(c))
                for i, ((x, y), c) in enumerate(zip(places, colours, strict=True))
            ]
        n = int(draw.integers(1, 3))
        task = task_of(asks(clause("cat", color="red"), clause("dog", n, position=["left of", 0])))
        strict = clearly_right(found, task, TAU)
        assert strict == (graded(found, task, TAU) == 1)
        assert published(found, task, TAU) or not strict
        seen.add((strict, published(found, task, TAU)))
    assert seen == {(False, False), (False, True), (True, True)}


def test_a_group_stands_right_only_if_each_does() -> None:
    task = task_of(asks(clause("cat"), clause("dog", 2, position=["left of", 0])))
    near, far = Detection("dog", 0.9, (0, 0, 10, 10)), Detection("dog", 0.8, (200, 0, 210, 10))
    assert published(CAT | {"dog": [near, near]}, task, TAU)
    assert not published(CAT | {"dog": [near, far]}, task, TAU)


# Positions


def box(x: float, y: float, size: float = 10) -> tuple[float, float, float, float]:
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def test_positions_are_those_of_the_picture_whose_y_points_down() -> None:
    centre = box(0, 0)
    assert positions(box(-50, 0), centre, TAU) == {"left of"}
    assert positions(box(50, 0), centre, TAU) == {"right of"}
    assert positions(box(0, -50), centre, TAU) == {"above"}
    assert positions(box(0, 50), centre, TAU) == {"below"}
    assert positions(box(50, 50), centre, TAU) == {"right of", "below"}
    assert positions(centre, centre, TAU) == set()
    # 45° in boxes of no size is .71 > 1/2 in both; 20° is .94 and .34
    assert positions(box(94, 34, 0), box(0, 0, 0), TAU) == {"right of"}


def test_boxes_must_be_apart_in_shares_of_their_sizes() -> None:
    for tau in (0.1, 0.25):
        edge = 2 * tau * 40  # |d| - τ·(20 + 20) > |d|/2 from there on
        assert positions(box(edge + 0.1, 0, 20), box(0, 0, 20), tau) == {"right of"}
        assert positions(box(edge - 0.1, 0, 20), box(0, 0, 20), tau) == set()


def test_the_other_way_round_is_the_opposite() -> None:
    draw = np.random.default_rng(1)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(200):
        a, b = (box(x, y, size) for x, y, size in draw.uniform((0, 0, 1), (40, 40, 20), (2, 3)))
        assert {opposite[p] for p in positions(a, b, TAU)} == positions(b, a, TAU)


# The reward

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def blobs(images: np.ndarray) -> list[list[dict[str, Any]]]:
    """A detector of one box of each colour, called "box"; it is sure of what is large."""
    answers: list[list[dict[str, Any]]] = []
    for image in images:
        answers.append([])
        for colour, rgb in COLOURS.items():
            ys, xs = np.nonzero((image == rgb).all(-1))
            if len(ys):
                where = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                answers[-1].append(
                    {"label": "box", "score": min(1, len(ys) / 100), "box": where, "colour": colour}
                )
    return answers


def picture(**boxes: tuple[int, int, int]) -> Tensor:
    """A grey picture [3, 32, 32] in [-1, 1] of boxes: colour = (x, y, size)."""
    x0 = torch.zeros(3, 32, 32)
    for colour, (x, y, size) in boxes.items():
        x0[:, y : y + size, x : x + size] = torch.tensor(COLOURS[colour])[:, None, None] / 127.5 - 1
    return x0


PICTURES = torch.stack(
    [
        picture(),
        picture(red=(2, 2, 10)),
        picture(red=(2, 2, 10), blue=(18, 2, 10)),
        picture(red=(2, 2, 10), green=(18, 2, 6)),  # score .36
        picture(blue=(2, 2, 10)),
    ]
)
RED, TWO = asks(clause("box", color="red")), asks(clause("box", 2), tag="counting")


@pytest.mark.parametrize(
    ("metadata", "rules", "expected"),
    [
        (RED, "strict", [0, 1, 0, 0, 0]),
        (RED, "published", [0, 1, 1, 1, 0]),
        (RED, "graded", [0, 1, 0, 0, 0.5]),
        (TWO, "graded", [0, 0.5, 1, 0.5, 0.5]),  # counting is stricter: .36 < .9
        (asks(clause("box", 2)), "graded", [0, 0.5, 1, 1, 0.5]),
    ],
)
def test_pictures_are_judged_for_their_prompts(
    metadata: dict[str, Any], rules: Any, expected: list[float]
) -> None:
    reward = GenEval(blobs, rules=rules)
    assert reward(PICTURES, ["a photo"] * 5, metadata=[metadata] * 5) == pytest.approx(expected)


def test_scores_count_above_their_threshold_and_only_so_many() -> None:
    def many(images: np.ndarray) -> list[list[Detection]]:
        return [[Detection("dog", score, (0, 0, 1, 1)) for score in (0.1, 0.3, 0.4, 0.9, 0.95)]]

    def judge(count: int, tag: str = "two_object", **options: Any) -> bool:
        reward = GenEval(many, rules="strict", **options)
        return reward(torch.zeros(1, 3, 4, 4), ["dogs"], [asks(clause("dog", count), tag=tag)]) == [1.0]

    assert judge(3) and judge(1, "counting") and judge(4, threshold=0.2) and judge(2, max_objects=2)
    assert judge(2, "counting", counting_threshold=0.5) and not judge(4)


def test_colours_are_asked_for_only_where_a_prompt_does() -> None:
    asked = []

    def look() -> str:
        asked.append(1)
        return "red"

    def one(images: np.ndarray) -> list[list[Detection]]:
        return [[Detection("dog", 0.9, (0, 0, 1, 1), look)] for _ in images]

    reward, image = GenEval(one), torch.zeros(1, 1, 4, 4)
    assert reward(image, ["a dog"], [asks(clause("dog"))]) == [1] and not asked
    assert reward(image, ["a red dog"], [RED_DOG]) == [1] and len(asked) == 1


def test_it_is_a_reward_of_latents_with_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red box", **RED}, {"prompt": "two boxes", **TWO}]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    prompts = prompts_of([], str(file), None)
    decoded = DecodedReward(GenEval(blobs), lambda z: z, prompts.texts, metadata=prompts.metadata)
    cond = torch.tensor([0, 1, 1, 0, 0])
    whole = BlackBox(decoded)(PICTURES, cond)
    assert whole.tolist() == [0, 0.5, 1, 0, 0.5]
    assert nondeterminism(decoded, PICTURES, cond) == 0
    assert BlackBox(decoded, batch_size=2)(PICTURES, cond).equal(whole)
    assert BlackBox(decoded)(PICTURES.flip(0), cond.flip(0)).equal(whole.flip(0))
    assert BlackBox(decoded)(PICTURES[:0], cond[:0]).shape == (0,)
    sent = pickle.loads(pickle.dumps(GenEval(blobs)))
    assert sent(PICTURES[1:2], ["a red box"], [RED]) == [1]


@pytest.fixture
def blobs_by_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The detector is registered; a list of when it was made."""
    made: list[str] = []

    def blobs_of_a_test() -> Callable[..., Any]:
        made.append("now")
        return blobs

    assert "blobs_of_a_test" not in DETECTORS
    monkeypatch.setattr(DETECTORS, "_entries", dict(DETECTORS._entries))
    monkeypatch.setattr(registry, "_USERS", {})
    DETECTORS.register("blobs_of_a_test")(blobs_of_a_test)
    yield made


def test_a_detector_by_its_name_is_made_when_it_is_needed_and_once(blobs_by_name: list[str]) -> None:
    reward = GenEval("blobs_of_a_test")
    again = pickle.loads(pickle.dumps(reward))
    assert not blobs_by_name
    assert reward(PICTURES[1:2], ["a red box"], [RED]) == again(PICTURES[1:2], ["a red box"], [RED]) == [1]
    assert len(blobs_by_name) == 1


# What is refused


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tag is None"),
        ({"tag": "counting"}, "include is None"),
        ({"tag": "counting", "include": []}, r"include is \[\]"),
        ({"tag": "counting", "include": "dog"}, "include is 'dog'"),
        (asks({"class": "dog"}), r"include\[0\] is {'class': 'dog'}: give class and count"),
        (asks(clause("dog", colour="red")), r"include\[0\] is .*nothing but class, color, count, position"),
        (asks(clause("cat"), clause("dog", 0)), r"include\[1\]\.count is 0"),
        (asks(clause("dog", 1.5)), r"include\[0\]\.count is 1\.5"),
        (asks(clause("")), r"include\[0\]\.class is ''"),
        (asks(clause("dog", color=3)), r"include\[0\]\.color is 3"),
        (asks(clause("dog", position=["left of", 0])), r"include\[0\]\.position is"),
        (asks(clause("cat"), clause("dog", position=["on", 0])), r"include\[1\]\.position is \['on', 0\]"),
        (asks(clause("cat"), clause("dog", position="left of")), r"include\[1\]\.position is 'left of'"),
        (asks(clause("cat"), clause("dog", position=["above", -1])), r"include\[1\]\.position"),
        (
            asks(clause("dog"), exclude=[clause("dog", 2, color="red")]),
            r"exclude\[0\] is .*nothing but class, count",
        ),
    ],
)
def test_wrong_metadata_name_the_prompt_and_the_field(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"metadata of the prompt 'second': {message}"):
        GenEval(blobs)(PICTURES[:2], ["first", "second"], [RED, metadata])


def answering(answer: Any) -> GenEval:
    return GenEval(lambda images: answer)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: GenEval(None), TypeError, "detector is None"),
        (lambda: GenEval("no_such"), ValueError, "detector is 'no_such': give one of"),
        (lambda: GenEval(blobs, rules="soft"), ValueError, "rules is 'soft'"),
        (lambda: GenEval(blobs, threshold=2), ValueError, "threshold is 2"),
        (lambda: GenEval(blobs, max_objects=0), ValueError, "max_objects is 0"),
        (lambda: GenEval(blobs, position_threshold=-1), ValueError, "position_threshold is -1"),
        (lambda: GenEval(blobs)(PICTURES), ValueError, "needs prompts with metadata"),
        (
            lambda: GenEval(blobs)(PICTURES, None, [RED]),
            ValueError,
            "5 answers of the detector and 1 metadata for 5",
        ),
        (lambda: answering([])(PICTURES[:1], ["x"], [RED]), ValueError, "0 answers of the detector"),
        (lambda: answering([["dog"]])(PICTURES[:1], ["x"], [RED]), TypeError, "the detector gave 'dog'"),
        (
            lambda: answering([[{"label": "dog", "score": 1, "bbox": [0, 0, 1, 1]}]])(
                PICTURES[:1], ["x"], [RED]
            ),
            TypeError,
            "give a Detection, or a mapping of label, score, box",
        ),
        (
            lambda: answering([[Detection("dog", 1, (0, 0, 1))]])(PICTURES[:1], ["x"], [RED]),
            ValueError,
            "a box of 4 finite numbers",
        ),
        (
            lambda: answering([[Detection("dog", float("nan"), (0, 0, 1, 1))]])(PICTURES[:1], ["x"], [RED]),
            ValueError,
            "a finite score",
        ),
        (
            lambda: answering([[Detection("dog", 1, (0, 0, 1, 1))]])(PICTURES[:1], ["x"], [RED_DOG]),
            ValueError,
            "asks for a red dog, and the detector gave no colour",
        ),
        (lambda: GenEval(blobs)(torch.zeros(1, 2), ["x"], [RED]), ValueError, r"for images \[N, C, H, W\]"),
        (lambda: GenEval(blobs)(torch.zeros(1, 4, 8, 8), ["x"], [RED]), ValueError, "4 channels"),
    ],
)
def test_what_cannot_be_is_named(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()
