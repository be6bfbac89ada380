"""Versions against the ranges that the installed metadata declares."""

from __future__ import annotations

from importlib import metadata

import pytest

from pronghorn.doctor import packages


class Metadata:
    """Installed distributions, made up: name -> (version, requirements)."""

    def __init__(self, **distributions: tuple[str, list[str]]) -> None:
        self.distributions = distributions

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packages.metadata, "version", lambda name: self._of(name)[0])
        monkeypatch.setattr(packages.metadata, "requires", lambda name: self._of(name)[1])

    def _of(self, name: str) -> tuple[str, list[str]]:
        if name not in self.distributions:
            raise metadata.PackageNotFoundError(name)
        return self.distributions[name]


OURS = ["torch>=2.11", "trl<2,>=1.15", "ruff>=1; extra == 'dev'", "winonly>=1; platform_system == 'Windows'"]


def test_the_installed_environment_is_in_range() -> None:
    assert [check.status for check in packages.python_version()] == ["ok"]
    checks = packages.versions()
    assert checks[0].status == "ok" and checks[0].name == "packages"
    assert f"torch {metadata.version('torch')}" in checks[0].detail
    assert not [check for check in checks if check.status == "fail"]


@pytest.mark.parametrize(
    ("torch", "trl", "failing"),
    [
        ("2.11.0+cu130", "1.15.0", []),
        ("2.10.1", "1.16.0", ["torch"]),
        ("2.13.0", "2.0.0", ["trl"]),
        ("2.14.0.dev20260101", "1.99", []),
    ],
)
def test_out_of_range(monkeypatch: pytest.MonkeyPatch, torch: str, trl: str, failing: list[str]) -> None:
    Metadata(pronghorn=("0.1.0", OURS), torch=(torch, []), trl=(trl, [])).install(monkeypatch)
    checks = packages.versions()
    assert [check.name.removeprefix("packages: ") for check in checks if check.status == "fail"] == failing
    if not failing:
        assert [check.status for check in checks] == ["ok"]
    if failing == ["torch"]:
        assert checks[0].remedy == "pip install 'torch>=2.11'" and "2.10.1 is outside >=2.11" in checks[0].detail


def test_a_missing_package_fails_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    Metadata(pronghorn=("0.1.0", OURS), torch=("2.13.0", [])).install(monkeypatch)
    (check,) = packages.versions()
    assert check.status == "fail" and "not installed" in check.detail
    assert check.remedy in ("pip install 'trl<2,>=1.15'", "pip install 'trl>=1.15,<2'")


def test_a_conflict_between_dependencies_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["triton==3.6.0; platform_system == 'Linux'", "torch>=1"]
    Metadata(
        pronghorn=("0.1.0", ["torch>=2.11"]),
        torch=("2.11.0", needs if packages.platform.system() == "Linux" else ["triton==3.6.0"]),
        triton=("3.9.0", []),
        vllm=("0.20.0", ["torch==2.12.0"]),
    ).install(monkeypatch)
    checks = packages.versions()
    assert [(check.name, check.status) for check in checks] == [
        ("packages", "ok"),
        ("packages: triton", "warn"),
        ("packages: torch", "warn"),
    ]
    assert "vllm 0.20.0 needs torch==2.12.0" in checks[2].detail


def test_an_old_interpreter_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.10.14")
    (check,) = packages.python_version()
    assert check.status == "fail" and "3.10.14" in check.detail


def test_running_from_a_folder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_DISTRIBUTION", "pronghorn-that-is-not-installed")
    for checks in (packages.python_version(), packages.versions()):
        assert [(c.status, c.remedy) for c in checks] == [("fail", "pip install .")]
        assert "not installed" in checks[0].detail
