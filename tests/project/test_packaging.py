"""The package as it is built and imported: the wheel against the tree, lazy names, one version."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import gymnasium
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffrl
from tests.kit.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def files_of_the_tree(suffixes: set[str]) -> set[str]:
    """Paths below the root, with the links diffrl/envs and diffrl/configs followed."""
    found = set()
    for folder, _, names in os.walk(ROOT / "diffrl", followlinks=True):
        paths = [(Path(folder) / name).relative_to(ROOT) for name in names]
        found |= {path.as_posix() for path in paths if path.suffix in suffixes}
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in a folder of the name that git gives a clone: building writes beside them."""
    source = tmp_path_factory.mktemp("work") / "diffrl"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("diffrl", "envs", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    """The wheel of a copy of the sources."""
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(clone / "dist"), str(clone))
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (clone / "dist").glob("*.whl")
    return path


def test_wheel_holds_each_file_of_the_tree_once(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"diffrl"}
    assert {n for n in names if n.endswith(".py")} == files_of_the_tree({".py"})
    data = {".pyi", ".yaml", ".typed", ".safetensors", ".json"}
    assert {n for n in names if Path(n).suffix in data} == files_of_the_tree(data)


def test_every_folder_of_modules_is_a_listed_package() -> None:
    folders = {Path(path).parent.as_posix().replace("/", ".") for path in files_of_the_tree({".py"})}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed files alone are enough for the environments and for Hydra's pkg://diffrl.configs."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import diffrl, diffrl.envs, importlib.resources as r\n"
        "print(diffrl.__file__, diffrl.envs.__file__, r.files('diffrl.configs'), sep='\\n')"
    )
    ran = python("-c", code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert all(Path(line).is_relative_to(tmp_path.resolve()) for line in ran.stdout.splitlines()), ran.stdout


def test_an_editable_install_is_found_from_the_folder_above_the_clone(clone: Path, tmp_path: Path) -> None:
    """There, a folder named diffrl comes first on the path, and is not the package."""
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    built = python("-c", build, cwd=clone)
    assert built.returncode == 0, built.stderr
    (editable,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(editable).extractall(tmp_path / "site")  # all that an installer does
    code = (
        f"import site, sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]  # not this checkout\n"
        f"site.addsitedir({str(tmp_path / 'site')!r})\n"
        "import diffrl, diffrl.envs, diffrl.configs\n"
        "print(diffrl.EDM.__name__, diffrl.__file__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone.parent,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["EDM", str(clone / "diffrl" / "__init__.py")]


def test_version_has_one_home(wheel: Path) -> None:
    assert "version" not in PROJECT["project"]
    assert wheel.name.split("-")[1] == diffrl.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)(?: — (\S+))?", changelog, flags=re.MULTILINE)
    assert headings[0] == ("Unreleased", "") and headings[1][0] == diffrl.__version__
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", date) for _, date in headings[1:])


@pytest.mark.parametrize("folder", ["envs", "configs"])
def test_root_folders_are_relative_links_in_the_package(folder: str) -> None:
    link = ROOT / "diffrl" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"


def test_import_is_light() -> None:
    heavy = {"torch", "torchrl", "tensordict", "hydra"}
    code = f"import sys, diffrl; print(*({heavy} & set(sys.modules)))"
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []


def test_short_name_of_the_environments_is_refused() -> None:
    ran = python("-c", "import envs")
    assert ran.returncode != 0
    assert "import it as diffrl.envs" in ran.stderr


@pytest.mark.parametrize("name", sorted(set(vars(diffrl)["__all__"]) - {"__version__"}))
def test_public_name_resolves(name: str) -> None:
    value = getattr(diffrl, name)
    assert name in dir(diffrl)
    if isinstance(value, ModuleType):
        assert value.__name__.startswith("diffrl.") and value.__name__.endswith(f".{name}")
    else:
        assert value.__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        diffrl.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_gymnasium_knows_the_environment() -> None:
    spec = gymnasium.spec("DiffusionMRP-v0")
    assert spec.entry_point == "diffrl.envs.gymnasium_mrp:DiffusionMRPEnv"
    assert spec.vector_entry_point == "diffrl.envs.gymnasium_mrp:DiffusionMRPVectorEnv"


def test_constraints_hold_every_dependency() -> None:
    asked = list(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        asked += [line for line in extra if not line.startswith("diffrl[")]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    held = [Requirement(line) for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(requirement.name): requirement.specifier for requirement in held}
    for requirement in map(Requirement, asked):
        (pin,) = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin.version.removesuffix(".*")), f"{pin} against {requirement}"
