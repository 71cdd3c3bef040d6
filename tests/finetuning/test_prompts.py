"""Prompts from a list, a file or a function by name, and the metadata that rewards get of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.finetuning.prompts import PROMPTS, Prompts, prompts_of
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.weighted_sum import WeightedSum

COUNTED = [("two cats", {"count": 2}), ("a dog", {"count": 1})]


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein Bär\n\n two dogs \r\n".encode())
    assert prompts_of([], str(file), None) == Prompts(["ein Bär", "two dogs"], None)


def test_a_file_of_objects_has_metadata(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two cats", "count": 2}\n\n{"prompt": "λ"}\n', encoding="utf-8")
    found = prompts_of([], str(file), None)
    assert found.texts == ["two cats", "λ"] and found.metadata is not None
    assert [about.get("count") for about in found.metadata] == [2, None]
    for line in ("two cats", '{"text": "a"}', "[1]", "3"):
        file.write_text(f'{{"prompt": "a"}}\n{line}\n', encoding="utf-8")
        with pytest.raises(InputError, match=r'prompts\.jsonl, line 2, is no JSON object with a "prompt"'):
            prompts_of([], str(file), None)


def test_a_function_of_ones_own_is_known_by_name() -> None:
    PROMPTS.register("counted_for_a_test")(lambda: COUNTED)
    found = prompts_of([], None, "counted_for_a_test")
    assert (
        found
        == Prompts(["two cats", "a dog"], [{"count": 2}, {"count": 1}])
        == prompts_of(COUNTED, None, None)
    )
    with pytest.raises(ValueError, match="prompts is 'nothing': give one of .*--import MODULE"):
        prompts_of([], None, "nothing")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (([], None, None), "give model.prompts, model.prompts_file or model.prompts_from"),
        ((["a"], "file", None), "one of them"),
        (([3], None, None), "strings, or pairs of a string and a mapping"),
        (([("a", 3)], None, None), "strings, or pairs"),
        (([], "nowhere.txt", None), "model.prompts_file nowhere.txt cannot be read"),
    ],
)
def test_what_gives_no_prompts_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        prompts_of(*given)


def counted(images: Tensor, prompts: list[str], metadata: Any = None) -> Tensor:
    return images.flatten(1).mean(1) + torch.tensor([float(about["count"]) for about in metadata])


def plain(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_a_reward_that_asks_for_metadata_gets_that_of_its_prompts() -> None:
    texts, metadata = [text for text, _ in COUNTED], [about for _, about in COUNTED]
    z, cond = torch.zeros(4, 1, 2, 2), torch.tensor([1, 0, 0, 1])

    def decoded(reward: Any) -> DecodedReward:
        return DecodedReward(reward, lambda z: z, texts, metadata=metadata)

    assert BlackBox(decoded(counted))(z, cond).tolist() == [1, 2, 2, 1]
    assert BlackBox(decoded(plain))(z, cond).tolist() == [5, 8, 8, 5]
    both = WeightedSum({"counted": (decoded(counted), 1.0), "plain": (decoded(plain), 10.0)})
    assert both(z, cond).tolist() == [51, 82, 82, 51]
    with pytest.raises(ValueError, match="1 metadata for 2 prompts"):
        DecodedReward(counted, lambda z: z, texts, metadata=metadata[:1])
