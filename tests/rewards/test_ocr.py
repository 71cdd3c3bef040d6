"""The reward of spelt text: its distance, its rules, and a real reader on pictures of words."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.text import edit_distance as edit_distance_of_torchmetrics

from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.by_name import READERS
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.ocr import TextAccuracy, edit_distance


@functools.cache
def by_recursion(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    changed = by_recursion(a[1:], b[1:]) + (a[0] != b[0])
    return min(changed, by_recursion(a[1:], b) + 1, by_recursion(a, b[1:]) + 1)


def test_edit_distance_equals_a_plain_recursion_and_another_librarys() -> None:
    draw = np.random.default_rng(0)
    words = ["", "a", "open", *("".join(draw.choice(list("abcλ"), draw.integers(0, 8))) for _ in range(30))]
    for a in words:
        for b in words:
            assert edit_distance(a, b) == by_recursion(a, b)
        assert edit_distance(a, words[2]) == int(
            edit_distance_of_torchmetrics([a], [words[2]], reduction="sum")
        )


def reads(*texts: Any) -> Callable[[np.ndarray], list[Any]]:
    """A reader that gives these texts, whatever it sees."""
    return lambda images: list(texts)


def reward(text: str, prompt: str, **options: Any) -> float:
    (number,) = TextAccuracy(reads(text), **options)(torch.zeros(1, 3, 4, 4), [prompt])
    return number


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("OPEN", 'a sign that says "open"', 1),
        ("", 'a sign that says "open"', 0),
        ("oven", 'a sign that says "open"', 3 / 4),
        ("o p e n", 'a sign that says "Op En"', 1),  # spaces and capitals do not count
        ("pen", '"open"', 3 / 4),
        ("opening hours", '"open"', 1),  # the whole text among other text
        ("something else", '"open"', 0),  # farther than its length
        ("open", '"open" and "closed"', 1),  # the first pair of quotes
        ("closed", '"open" and "closed"', 0),
        ("a", '"b"', 0),
    ],
)
def test_rewards_by_hand(text: str, prompt: str, expected: float) -> None:
    assert reward(text, prompt) == pytest.approx(expected)


def test_other_text_costs_where_the_text_must_stand_alone() -> None:
    assert reward("opens", '"open"', substring=False) == pytest.approx(3 / 4)
    assert reward("opening hours", '"open"', substring=False) == 0
    assert reward("open", '"open"', substring=False) == 1


def test_metadata_go_before_quotes() -> None:
    accuracy = TextAccuracy(reads("open", "open"))
    images, prompts = torch.zeros(2, 1, 4, 4), ["a sign", '"closed"']
    assert accuracy(images, prompts, metadata=[{"text": "open"}, {"text": "Open"}]) == [1, 1]
    mixed = accuracy(images, ["a sign", '"open"'], metadata=[{"text": "open"}, {}])
    assert mixed == [1, 1]


def test_each_image_has_its_own_prompt_and_none_has_none() -> None:
    images, prompts = torch.zeros(3, 3, 4, 4), ['"one"', '"two"', '"three"']
    assert TextAccuracy(reads("one", "two", ""))(images, prompts) == [1, 1, 0]
    assert TextAccuracy(reads())(images[:0], []) == []


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: TextAccuracy(3), TypeError, "reader is 3"),
        (lambda: TextAccuracy("no_such"), ValueError, "reader is 'no_such': give one of rapidocr"),
        (lambda: reward("open", "a sign"), ValueError, "'a sign' has no text to look for"),
        (lambda: reward("open", 'a " sign'), ValueError, "has no text to look for"),
        (lambda: reward("open", 'a " " sign'), ValueError, "has no text to look for"),
        (lambda: reward("open", "a “sign”"), ValueError, "put it in straight quotes"),
        (lambda: reward(None, '"open"'), TypeError, "the reader gave None"),
        (
            lambda: TextAccuracy(reads("a"))(torch.zeros(2, 3, 4, 4), ['"a"'] * 2),
            ValueError,
            "1 texts for 2 images",
        ),
        (
            lambda: TextAccuracy(reads("a"))(torch.zeros(1, 3, 4, 4)),
            ValueError,
            "needs prompts, one for each of the 1",
        ),
        (
            lambda: TextAccuracy(reads("a"))(torch.zeros(1, 3, 4, 4), ["a sign"], [{"text": 3}]),
            ValueError,
            "has no text to look for",
        ),
        (
            lambda: TextAccuracy(reads("a"))(torch.zeros(1, 3), ['"a"']),
            ValueError,
            r"for images \[N, C, H, W\]",
        ),
    ],
)
def test_what_cannot_be_is_named(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


# The reader that comes with a package


def written(text: str, size: int = 48, colour: str = "black", noise: float = 0.0) -> Tensor:
    """A picture [3, 128, 256] in [-1, 1] of a text in Pillow's own letters."""
    image = Image.new("RGB", (256, 128), "white")
    ImageDraw.Draw(image).text((10, 30), text, fill=colour, font=ImageFont.load_default(size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    return pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reader() -> Any:
    for module in ("onnxruntime", "rapidocr"):
        pytest.importorskip(module, reason="pip install 'diffrl[ocr]'")
    return READERS["rapidocr"]()


def test_a_real_reader_reads_words(reader: Any) -> None:
    images = torch.stack([written("HELLO"), written("New 42"), written(""), written("red", colour="red")])
    accuracy = TextAccuracy(reader)
    assert accuracy(images, ['"Hello"', '"new 42"', '"Hello"', '"red"']) == [1, 1, 0, 1]
    assert accuracy(written("Hello", size=12)[None], ['"Hello"']) == [1]


def test_a_real_reader_orders_pictures_by_what_they_spell(reader: Any) -> None:
    images = torch.stack([written(text) for text in ("HELLO", "HELO", "HOLD", "")])
    decoded = DecodedReward(TextAccuracy(reader), lambda z: z, ['a poster, "HELLO"'])
    rewards = BlackBox(decoded, batch_size=2)(images, torch.zeros(4, dtype=torch.long))
    assert rewards.tolist() == pytest.approx([1, 4 / 5, 2 / 5, 0])
    drowned = torch.stack([written("HELLO"), written("HELLO", noise=3.0)])
    clear, noisy = BlackBox(decoded)(drowned, torch.zeros(2, dtype=torch.long)).tolist()
    assert clear == 1 > noisy


def test_a_reader_by_name_travels_as_its_name() -> None:
    assert pickle.loads(pickle.dumps(TextAccuracy("rapidocr"))).reader == "rapidocr"
