"""Pictures of chains, and the wrappers of Gymnasium that show and record them."""

import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import HumanRendering, RecordVideo

from diffrl.envs.drawing import LATENT, PATH
from diffrl.errors import InputError

FORMS = ("DiffusionMDP-v0", "DiffusionMRP-v0")


def where(frame: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour, [M, 2]."""
    return np.argwhere((frame == colour).all(-1))


def test_a_scatter_shows_the_latent_where_it_is() -> None:
    """The data's box, ±1, fills the picture but for a margin of a tenth; up is up."""
    env: Any = gymnasium.make(FORMS[0], num_steps=2, render_mode="rgb_array", action_scale=1.0)
    env.reset(options={"x_t": np.zeros(2)})
    at_start = env.render()
    assert at_start.shape == (256, 256, 3) and at_start.dtype == np.uint8
    middle = where(at_start, LATENT).mean(0)
    np.testing.assert_allclose(middle, [127.5, 127.5], atol=1)
    assert len(where(at_start, PATH)) == 0
    for _ in range(2):
        env.step(np.array([0.8, 0.4], np.float32))
    at_end = env.render()
    row, column = where(at_end, LATENT).mean(0)
    np.testing.assert_allclose([row, column], [127.5 * (1 - 0.4 / 1.1), 127.5 * (1 + 0.8 / 1.1)], atol=1)
    assert len(where(at_end, PATH)) > 50


def test_an_image_is_shown_as_it_is() -> None:
    env: Any = gymnasium.make(FORMS[1], data="digits", num_steps=3, render_mode="rgb_array")
    _, info = env.reset(seed=0)
    noisy = env.render()
    for _ in range(3):
        env.step(0)
    frame = env.render()
    assert noisy.shape == frame.shape == (256, 256, 3) and not np.array_equal(noisy, frame)
    expected = np.round((info["x0"][0] + 1) * 127.5).astype(np.uint8)
    for channel in range(3):
        np.testing.assert_array_equal(frame[::32, ::32, channel], expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("data", ["gmm", "digits", "rings", "one number"])
def test_every_chain_of_a_vector_is_drawn(form: str, data: str) -> None:
    variant: dict[str, Any] = {"data": data, "num_steps": 2}
    if data == "one number":
        variant |= {"data": "gmm", "data_kwargs": {"dim": 1}}
    if data == "digits" and form == FORMS[0]:
        variant["reward"] = "ink"
    env = gymnasium.make_vec(form, num_envs=3, render_mode="rgb_array", **variant)
    env.reset(seed=0)
    for _ in range(4):  # through a restart
        env.step(env.action_space.sample())
    frames = env.render()
    assert len(frames) == 3 and all(f.shape == frames[0].shape and f.dtype == np.uint8 for f in frames)
    assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_rendered(form: str) -> None:
    env: Any = gymnasium.make(form).unwrapped
    env.reset()
    with pytest.raises(
        InputError, match="render_mode is None: make the environment with render_mode='rgb_array'"
    ):
        env.render()
    with pytest.raises(ResetNeeded, match="nothing to render"):
        gymnasium.make(form, render_mode="rgb_array").unwrapped.render()


def test_wrappers_that_show_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SDL_VIDEODRIVER", "dummy")  # no screen
    pytest.importorskip("pygame")
    shown: Any = HumanRendering(gymnasium.make(FORMS[0], num_steps=2, render_mode="rgb_array"))
    shown.reset(seed=0)
    shown.step(shown.action_space.sample())
    assert shown.screen_size == (256, 256)
    shown.close()
    pytest.importorskip("moviepy")
    recorded: Any = RecordVideo(
        gymnasium.make(FORMS[0], num_steps=3, render_mode="rgb_array"),
        str(tmp_path / "videos"),
        disable_logger=True,
    )
    recorded.reset(seed=0)
    for _ in range(3):
        recorded.step(recorded.action_space.sample())
    recorded.close()
    assert [p.suffix for p in (tmp_path / "videos").iterdir()] == [".mp4"]
