"""The folders at the root are the package `skipit`: what is declared, installed, shipped and imported agrees."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from shape_checks import check_shapes
from torch import Tensor

import skipit
import skipit.router

ROOT = Path(__file__).parents[1]
FOLDERS = {"skipit": "src/skipit", **{f"skipit.{name}": name for name in ("router", "theory", "train", "eval")}}
REINSTALL = "install the package again after adding or removing a file: uv pip install --no-deps -e ."


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules_in_folders() -> dict[str, Path]:
    """Every Python file of the package, by the name of its module, with its path relative to the root."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path.relative_to(ROOT)
    return found


def test_declared_packages_are_the_folders_with_python_files(pyproject: dict[str, Any]) -> None:
    folders = {}
    for module, path in modules_in_folders().items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        folders[package] = path.parent.as_posix()
    assert set(pyproject["tool"]["setuptools"]["packages"]) == set(folders)
    assert pyproject["tool"]["setuptools"]["package-dir"] == folders


def test_every_package_has_an_init_file() -> None:
    for path in modules_in_folders().values():
        assert (ROOT / path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_installed_tree_is_the_folders() -> None:
    installed_root = Path(skipit.__file__).parent
    installed = {path.relative_to(installed_root) for path in installed_root.rglob("*.py")}
    expected = {Path(*name.split(".")[1:]): path for name, path in modules_in_folders().items()}
    expected_files = {
        module / "__init__.py" if path.name == "__init__.py" else module.with_suffix(".py")
        for module, path in expected.items()
    }
    assert installed == expected_files, REINSTALL
    for path in installed_root.rglob("*.py"):
        assert path.resolve().is_file(), f"{path} points nowhere; {REINSTALL}"
    assert (installed_root / "py.typed").is_file(), REINSTALL


def test_version_is_the_declared_one(pyproject: dict[str, Any]) -> None:
    assert importlib.metadata.version("skipit") == pyproject["project"]["version"]


def test_public_names_are_there_and_type_checkers_see_the_same() -> None:
    tree = ast.parse((ROOT / "src" / "skipit" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    typed = {alias.name: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert typed == skipit._PUBLIC
    for name in skipit.__all__:  # the first look imports a module, which must not take the name's place
        assert getattr(skipit, name) is getattr(skipit, name)
        assert getattr(skipit, name).__name__ == name


def test_modules_are_named_by_their_idea() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [path for path in modules_in_folders().values() if nameless & {path.stem, *path.parts}]


def test_no_pickles_are_tracked() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    pickles = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".bin"}
    assert not [name for name in listed.stdout.split("\0") if Path(name).suffix in pickles]


def test_constraints_are_exact_and_name_no_source() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement = line.partition(";")[0].strip()
        name, equals, version = requirement.partition("==")
        exact = bool(equals and name.strip() and version[0].isdigit())
        assert exact, f"`{line}` is not one exact version"
        assert not {"/", "@"} & set(requirement), f"`{line}` names where it comes from"


def imported_modules(statement: str, cwd: Path, *paths: Path) -> set[str]:
    """The modules that a statement adds to `sys.modules` of a fresh interpreter whose path starts with `paths`."""
    setup = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}"
    code = f"{setup}; before = set(sys.modules); {statement}; print(*set(sys.modules) - before, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_is_light(tmp_path: Path) -> None:
    imported = imported_modules("import skipit", tmp_path)
    heavy = {"accelerate", "datasets", "deepspeed", "matplotlib", "peft", "scipy", "sklearn", "torch", "transformers"}
    assert "skipit" in imported
    assert not imported & heavy
    assert len(imported) < 150, "the number of modules stands for the time, which no test can rely on"


def test_shapes_and_only_shapes_are_checked_while_tests_run() -> None:
    assert type(skipit.router.__spec__.loader).__module__ == "shape_checks"

    @check_shapes
    def count_rows(x: Float[Tensor, "rows 2"] | None, unit: Literal["row"] = "row") -> int:
        return 0 if x is None else len(x)

    assert count_rows(torch.zeros(3, 2), unit="column") == 3
    assert count_rows(None) == 0
    with pytest.raises(TypeCheckError, match="x"):
        count_rows(torch.zeros(3, 4))

    @check_shapes
    def first(x: Float[Tensor, "rows dim"], dim: int) -> Float[Tensor, "dim"]:
        return x[0, :dim]

    @check_shapes
    def some(x: Float[Tensor, "rows dim"], dim: int) -> Float[Tensor, "{dim}"]:
        return x[0, :2]

    assert len(first(torch.zeros(3, 4), 4)) == len(some(torch.zeros(3, 4), 2)) * 2
    for function in (first, some):
        with pytest.raises(TypeCheckError, match="return"):
            function(torch.zeros(3, 4), 3)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders behind that later builds would ship."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in (*FOLDERS.values(), "scripts"):  # studies are there, and are not shipped
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_ships_the_folders_and_nothing_else(wheel: Path, pyproject: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as file:
        shipped = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = set()
    for name, path in modules_in_folders().items():
        base = name.replace(".", "/")
        expected.add(f"{base}/__init__.py" if path.name == "__init__.py" else f"{base}.py")
    settings = pyproject["tool"]["setuptools"]
    for package, patterns in settings["package-data"].items():
        folder = ROOT / settings["package-dir"][package]
        files = [path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern)]
        assert files, f"{package}: nothing matches {patterns}"
        expected |= {f"{package.replace('.', '/')}/{path.as_posix()}" for path in files}
    assert shipped == expected
    assert wheel.stat().st_size < 37_000_000  # two references' weights, of 2.3 and 11.9 million parameters


def test_wheel_is_importable(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    statement = (
        "import skipit, skipit.router, skipit.train.reference.digits as digits; "
        f"assert digits.__file__.startswith({str(tmp_path)!r}), digits.__file__"
    )
    assert "skipit.train.reference.digits" in imported_modules(statement, tmp_path, tmp_path)
