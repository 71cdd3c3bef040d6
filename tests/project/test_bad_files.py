"""Files of the user's own that are not what they should be: data, plans, prompts, models, pipelines, pictures."""

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

import diffrl
from diffrl.errors import DiffrlError
from tests.kit.bad_inputs import DAMAGES, FAST, contents, tell, thrown

pytestmark = pytest.mark.usefixtures("quiet_place")


def own_files(place: Path) -> list[tuple[Path, list[str]]]:
    """Data in every form, and the words that name them."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    idx = bytes([0, 0, 8, 3, *(b for n in (20, 4, 4) for b in (0, 0, 0, n))]) + pixels.tobytes()
    np.savez(place / "x.npz", x=pixels)
    (place / "x.idx").write_bytes(idx)
    (place / "x.idx.gz").write_bytes(gzip.compress(idx))
    for i, image in enumerate(pixels):
        folder = place / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    shutil.make_archive(str(place / "images"), "zip", place / "images")
    return [
        (place / "x.npz", ["data=npz", f"data.path={place / 'x.npz'}"]),
        (place / "x.idx", ["data=idx", f"data.path={place / 'x.idx'}"]),
        (place / "x.idx.gz", ["data=idx", f"data.path={place / 'x.idx.gz'}"]),
        (place / "images.zip", ["data=folder", f"data.path={place / 'images.zip'}"]),
        (place / "images" / "0" / "00.png", ["data=folder", f"data.path={place / 'images'}"]),
    ]


def test_data_of_one_s_own_damaged(tmp_path: Path) -> None:
    counts = Counter[str]()
    train = [w for w in FAST["train"] if not w.startswith("data")]
    for file, words in own_files(tmp_path):
        whole = file.read_bytes()
        assert thrown("train", [*train, *words]) == ""
        for damage, change in DAMAGES.items():
            file.write_bytes(change(whole))
            said = thrown("train", [*train, *words])
            counts["refused" if said else "accepted"] += 1
            assert (file.name in said or str(file.parent) in said) if said else damage == "flipped", said
        file.write_bytes(whole)
    tell("data", counts)
    assert counts["refused"] >= 25


PLANS = (
    *(
        "",
        "3",
        "- a",
        "name: [",
        "name: x",
        "\xff\xfe",
        "name: x\ncases: {a: [b]}\nstudies: {s: 3}",
        "cases: {a: 3}",
    ),
    "name: x\ncases: {a: [nope=1]}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: []}\nstudies: {s: {cases: [z], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: []}\nstudies: {s: {cases: [a], seeds: [x], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: []}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, axes: {λ: objective.lmbda}}}",
    "name: x\ncases: {a: ['data=[']}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: ['data=3']}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: ${nope}\ncases: {a: []}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
)
"""Files that are no plan of a comparison."""


@pytest.mark.parametrize("plan", PLANS)
def test_plans_that_are_none(plan: str, tmp_path: Path) -> None:
    (tmp_path / "conf" / "plan").mkdir(parents=True)
    (tmp_path / "conf" / "plan" / "mine.yaml").write_bytes(
        plan.encode("latin-1" if "\xff" in plan else "utf-8")
    )
    said = thrown("compare", ["--config-dir", str(tmp_path / "conf"), "plan=mine", "out=out"], real=True)
    assert said and not (tmp_path / "out").exists()


# Prompts

TEXTS = {
    "empty.txt": b"", "blank.txt": b"\n \n", "latin.txt": b"ros\xe9", "image.txt": DAMAGES["foreign"](b""),
    "empty.jsonl": b"", "text.jsonl": b"a cat", "list.jsonl": b"[1]", "number.jsonl": b"3", "null.jsonl": b"null",
    "other.jsonl": b'{"text": "a cat"}', "of_number.jsonl": b'{"prompt": 3}', "cut.jsonl": b'{"prompt": "a',
    "second.jsonl": b'{"prompt": "a"}\n{}', "deep.jsonl": b"[" * 100_000, "image.jsonl": DAMAGES["foreign"](b""),
}  # fmt: skip
TUNE = [word for word in FAST["finetune"] if not word.startswith(("reward", "heldout"))]
TUNE += ["model=pipeline", "reward=jpeg_compressibility", "heldout_reward=none", "model.weights=float32"]


@pytest.mark.parametrize("name", [*TEXTS, "nowhere.txt", "."])
def test_files_without_prompts(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name in TEXTS:
        file.write_bytes(TEXTS[name])
    said = thrown("finetune", [*TUNE, "model.path=/nowhere", f"model.prompts_file={file}"])
    assert f"model.prompts_file {file}" in said or str(file) in said


# Models


def description(raw: bytes) -> dict[str, Any]:
    size = int.from_bytes(raw[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["diffrl"])
    return found


def loaded(file: Path, counts: Counter[str]) -> None:
    """Load a model in Python, which names it or takes it whole."""
    try:
        model = diffrl.load(file)
        assert model.sample(2, num_steps=3).shape == (2, 2)
    except DiffrlError as error:
        assert "\n" not in str(error), error
        counts["refused"] += 1
    else:
        counts["accepted"] += 1


def test_models_that_are_damaged(tmp_path: Path) -> None:
    """As bytes, and in every entry of their description."""
    file, counts = tmp_path / "model.safetensors", Counter[str]()
    diffrl.save(diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=8), diffrl.EDM()), file)
    whole = file.read_bytes()
    for change in DAMAGES.values():
        file.write_bytes(change(whole))
        refused = counts["refused"]
        loaded(file, counts)
        assert bool(thrown("sample", [str(file)])) >= (counts["refused"] > refused)
    wrong: Any
    told, tensors = description(whole), safetensors.torch.load(whole)
    groups = {name: told[name] for name in ("process", "network", "denoiser")}
    places = [(told, name) for name in told] + [(group, name) for group in groups.values() for name in group]
    for group, name in places:
        right = group[name]
        for wrong in ("text", None, [], {}, -1, 0, 1.5, 1e30, float("nan"), 10**15, [10**9, 10**9], True):
            group[name] = wrong
            file.write_bytes(safetensors.torch.save(tensors, {"diffrl": json.dumps(told)}))
            try:
                loaded(file, counts)
            except Exception as error:
                raise AssertionError(f"{name}={wrong}: {type(error).__name__}: {error}") from error
        group[name] = right
    tell("models", counts)
    assert counts["refused"] > 100 and counts["accepted"] > 5


# Pipelines


@pytest.mark.slow
def test_pipelines_that_are_damaged(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.kit.pipelines import stable_diffusion

    whole, place, counts = tmp_path / "whole", tmp_path / "place", Counter[str]()
    stable_diffusion().save_pretrained(whole)
    words = [*TUNE, f"model.path={place}", "model.prompts=[a cat]"]
    shutil.copytree(whole, place)
    assert thrown("finetune", words) == ""
    files = [f.relative_to(whole) for f in sorted(whole.rglob("*")) if f.is_file()]
    for file in files:
        for damage, change in DAMAGES.items():
            (place / file).write_bytes(change((whole / file).read_bytes()))
            before = contents(place)
            said = thrown("finetune", words)
            assert contents(place) == before and "weights_only" not in said
            counts["refused" if said else "accepted"] += 1
            assert str(place) in said if said else damage == "flipped", (file, damage)
        shutil.copyfile(whole / file, place / file)
    for weights in sorted(place.rglob("*.safetensors")):
        weights.rename(weights.with_suffix(".bin"))
        assert str(place) in (said := thrown("finetune", words)) and "weights_only" not in said
        weights.with_suffix(".bin").rename(weights)
        counts["refused"] += 1
    tell("pipelines", counts)
    assert counts["refused"] > 40


# Pictures


@pytest.mark.parametrize(
    "out",
    [
        "/proc/x.png",
        "/dev/null/x.png",
        "file/x.png",
        "folder",
        "x.nope",
        f"{'n' * 300}.png",
        "",
        "x",
    ],
)
def test_pictures_in_impossible_places(out: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    before, mine = contents(runs), contents(tmp_path)
    said = thrown("sample", [str(runs / "base"), "--nfe", "3", "--samples", "2", "--out", out])
    assert said and contents(runs) == before and contents(tmp_path) == mine


@pytest.mark.parametrize(
    "words",
    [
        *(["--nfe", value] for value in ("0", "-1", "x", "1e30", "nan", str(10**6))),
        *(["--samples", value] for value in ("0", "-1", "x", "1e30", str(10**15))),
        *(["--seed", value] for value in ("-1", "x", str(10**22))),
        *(["--guidance-scale", value] for value in ("x", "nan", "inf", "2")),
        *(["--objective", value] for value in ("nope",)),
        *(["--nope"], ["--out"], ["more"]),
    ],
)
def test_words_of_sampling(words: list[str], runs: Path) -> None:
    before = contents(runs)
    assert thrown("sample", [str(runs / "base"), "--nfe", "3", "--samples", "2", *words])
    assert contents(runs) == before
