"""The command line: what is printed, what is JSON, and which status it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pronghorn
from pronghorn.cli import doctor as command
from pronghorn.cli.main import app
from pronghorn.doctor.base import Check

ROOT = Path(__file__).resolve().parents[2]
runner = CliRunner()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pronghorn.cli.main", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, text=True, cwd=ROOT, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The real doctor, once, with a stray library in the way."""
    stray = tmp_path_factory.mktemp("stray")
    (stray / "libcudart.so.13").touch()
    return run("doctor", "--json", LD_LIBRARY_PATH=str(stray), CUDA_HOME="", CUDA_PATH="", LD_PRELOAD="")


def test_doctor_prints_json_and_nothing_else(on_this_machine: subprocess.CompletedProcess[str]) -> None:
    answer = json.loads(on_this_machine.stdout)
    assert set(answer) == {"pronghorn", "status", "checks"}
    assert answer["pronghorn"] == pronghorn.__version__
    for check in answer["checks"]:
        assert set(check) == {"name", "status", "detail", "remedy"}
        assert check["status"] in ("ok", "warn", "fail") and check["detail"]
        assert check["status"] == "ok" or check["remedy"], f"no remedy: {check}"
    assert (on_this_machine.returncode == 1) == (answer["status"] == "fail")


def test_doctor_really_runs_what_it_reports(on_this_machine: subprocess.CompletedProcess[str]) -> None:
    checks = {check["name"]: check for check in json.loads(on_this_machine.stdout)["checks"]}
    for name in ("python", "packages", "triton", "attention", "bitsandbytes"):
        assert checks[name]["status"] == "ok", checks[name]
    assert "math" in checks["attention"]["detail"] and "flash" in checks["attention"]["detail"]
    assert checks["LD_LIBRARY_PATH"]["status"] == "warn" and "libcudart.so.13" in checks["LD_LIBRARY_PATH"]["detail"]


def with_checks(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(command, "checkers", lambda device: {"made up": lambda: list(checks)})


OK = Check("first", "ok", "fine")
WARN = Check("second", "warn", "half [bold]fine[/bold]", "export A=b")
FAIL = Check("third", "fail", "broken", "pip install 'torch>=2.11'")


@pytest.mark.parametrize(("checks", "status"), [((OK,), 0), ((OK, WARN), 0), ((OK, WARN, FAIL), 1)])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, checks: tuple[Check, ...], status: int) -> None:
    with_checks(monkeypatch, *checks)
    for arguments in (["doctor"], ["doctor", "--json"]):
        assert runner.invoke(app, arguments).exit_code == status


def test_lines_are_readable_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = Check("a name too long for it", "warn", "word " * 60, "a-command " * 6)
    with_checks(monkeypatch, OK, WARN, FAIL, long)
    lines = runner.invoke(app, ["doctor"]).output.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any(line.startswith("ok   first") for line in lines)
    assert any("half [bold]fine[/bold]" in line for line in lines), "text is shown as it is, never as markup"
    assert "     fix: pip install 'torch>=2.11'" in lines
    assert lines[-1].startswith("1 ok, 2 warn, 1 fail: not ready") or lines[-2].startswith("1 ok, 2 warn, 1 fail")


def test_a_long_remedy_stays_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    remedy = "export LD_LIBRARY_PATH=" + ":".join(f"/opt/library/number{i}" for i in range(8))
    with_checks(monkeypatch, Check("x", "warn", "y", remedy))
    assert f"fix: {remedy}" in runner.invoke(app, ["doctor"]).output.splitlines()


def test_device_reaches_the_checks_and_their_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def checkers(device: int | None) -> dict[str, Any]:
        seen.update(device=device, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        return {}

    monkeypatch.setattr(command, "checkers", checkers)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert runner.invoke(app, ["doctor", "--device", "1"]).exit_code == 0
    assert seen == {"device": 1, "visible": "7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    refused = runner.invoke(app, ["doctor", "--device", "2"])
    assert refused.exit_code == 2 and "error: device=2" in refused.output


def test_version() -> None:
    result = runner.invoke(app, ["version"])
    assert result.exit_code == 0 and result.output.startswith(f"pronghorn {pronghorn.__version__}\n")


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from pronghorn.cli.main import app\n"
        "print(CliRunner().invoke(app, ['--help']).output); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("doctor", "quickstart", "report", "version"))


def test_report_of_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    result = runner.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and result.output.startswith("error: run_dir=") and "Traceback" not in result.output


def test_quickstart_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = pytest.importorskip("pronghorn.recipes.quickstart")
    seen = []
    monkeypatch.setattr(recipe, "run", lambda config: seen.append(config))
    result = runner.invoke(app, ["quickstart", "--seed", "3", "--steps", "2", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (seen[0].seed, seen[0].steps, seen[0].output_dir) == (3, 2, str(tmp_path))
    assert runner.invoke(app, ["quickstart", "--steps", "0"]).exit_code == 2
