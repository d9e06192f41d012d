"""The package as it is installed: complete, loaded once, and without traces of the machine that made it."""

from __future__ import annotations

import importlib.resources
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _python(*lines: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # -P would hide the very thing to test: that the working directory comes first on the path.
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True)


def _tree() -> set[str]:
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "bwsk_fx").rglob("__init__.py")}
    return packages | {f"bwsk_fx.{'.'.join(path.parent.relative_to(ROOT).parts)}" for path in _passes()}


def _passes() -> list[Path]:
    return list((ROOT / "passes").rglob("__init__.py"))


def test_the_list_of_packages_is_the_tree():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == _tree()
    assert "bwsk_fx.passes" in listed


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for top in ("bwsk_fx", "passes") for path in (ROOT / top).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_passes_come_from_the_top_level_folder():
    import bwsk_fx.passes

    source = Path(bwsk_fx.passes.__file__)
    assert source.parent.name == "passes"
    assert {path.name for path in source.parent.glob("*.py")} == {path.name for path in (ROOT / "passes").glob("*.py")}


def test_a_stray_import_of_passes_fails():
    done = _python("import passes")
    assert done.returncode == 1
    assert "ImportError: attempted relative import beyond top-level package" in done.stderr


def test_somebody_elses_passes_do_not_get_in_the_way(tmp_path):
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    lines = [
        "import sys, bwsk_fx.passes.pipeline",
        "assert 'passes' not in sys.modules",
        "print(bwsk_fx.passes.__name__)",
    ]
    done = _python(*lines, folder=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "bwsk_fx.passes"), done.stderr


def test_data_files_are_there_and_declared():
    files = {
        path.relative_to(ROOT / "bwsk_fx")
        for path in (ROOT / "bwsk_fx").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["bwsk_fx"]
    assert not [file for file in files if not any(file.match(pattern) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(file.match(pattern) for file in files)]
    package = importlib.resources.files("bwsk_fx")
    for file in files:
        assert package.joinpath(*file.parts).is_file()
    assert Path("py.typed") in files


def test_version_is_that_of_the_newest_change_and_of_the_citation():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest.group(1) == PROJECT["project"]["version"] == version("bwsk-fx")
    assert f"\nversion: {newest.group(1)}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_command_is_installed():
    assert PROJECT["project"]["scripts"] == {"bwsk-fx": "bwsk_fx.cli:main"}
    done = subprocess.run([Path(sys.executable).parent / "bwsk-fx", "--version"], capture_output=True, text=True)
    assert done.stdout.split() == ["bwsk-fx", version("bwsk-fx")]


# Split, so that this file does not find itself.
TRACES = (
    "/" + "work/",
    "/" + "root/",
    "/" + "home/",
    "/" + "tmp/",
    "/opt/" + "wheels",
    "pypi" + ".org",
    "python" + "hosted",
)
BINARY = {".png", ".jpg", ".safetensors", ".pyc", ".pt"}


def _files_of_the_repository() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix not in BINARY]


def test_no_file_names_a_machine_or_a_registry():
    files = [path for path in _files_of_the_repository() if path.is_file()]
    assert ROOT / "README.md" in files
    found = [(path.name, trace) for path in files for trace in TRACES if trace in path.read_text()]
    assert not found


def test_relative_links_of_the_documentation_lead_somewhere():
    pages = [path for path in _files_of_the_repository() if path.suffix == ".md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert links
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]
