"""Stray variables: what each puts before the wheels, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.doctor.compute import loaded_libraries
from pronghorn.doctor.environment import cuda_variables, settings


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_nothing_set_is_ok() -> None:
    (check,) = cuda_variables({"PATH": "/usr/bin", "LD_LIBRARY_PATH": ""})
    assert check.status == "ok" and check.remedy is None


def test_a_stray_library_path_is_named_with_what_it_shadows(tmp_path: Path) -> None:
    stray = touch(tmp_path / "cuda", "libcudart.so.13", "libcudnn_engines.so.9", "libz.so.1")
    driver = touch(tmp_path / "driver", "libcuda.so.1", "libnvidia-ml.so.1")
    (check,) = cuda_variables({"LD_LIBRARY_PATH": f"{stray}:{driver}"})
    assert (check.name, check.status) == ("LD_LIBRARY_PATH", "warn")
    assert "libcudart.so.13" in check.detail and "libcudnn_engines.so.9" in check.detail
    assert "libz" not in check.detail and "libcuda.so" not in check.detail and str(driver) not in check.detail
    assert check.remedy == f"export LD_LIBRARY_PATH={driver}", "what shadows nothing stays"
    (alone,) = cuda_variables({"LD_LIBRARY_PATH": f"{stray}:{tmp_path / 'absent'}:"})
    assert alone.remedy == f"export LD_LIBRARY_PATH={tmp_path / 'absent'}"
    (alone,) = cuda_variables({"LD_LIBRARY_PATH": str(stray)})
    assert alone.remedy == "unset LD_LIBRARY_PATH"
    (harmless,) = cuda_variables({"LD_LIBRARY_PATH": str(driver)})
    assert harmless.status == "ok"


@pytest.mark.parametrize("name", ["libcublasLt.so.13", "libnccl.so.2", "libnvrtc.so.13", "libnvJitLink.so.13"])
def test_each_library_of_the_wheels_is_known(tmp_path: Path, name: str) -> None:
    (check,) = cuda_variables({"LD_LIBRARY_PATH": str(touch(tmp_path, name))})
    assert check.status == "warn" and name in check.detail


def test_a_toolkit_and_preloads(tmp_path: Path) -> None:
    touch(tmp_path / "toolkit" / "lib64", "libcublas.so.12")
    checks = cuda_variables(
        {
            "CUDA_HOME": str(tmp_path / "toolkit"),
            "CUDA_PATH": str(tmp_path / "gone"),
            "LD_PRELOAD": "/usr/lib/libjemalloc.so.2:/opt/libnccl.so.2",
            "TRITON_PTXAS_PATH": "/opt/ptxas",
        }
    )
    assert [(check.name, check.status, check.remedy) for check in checks] == [
        ("CUDA_HOME", "warn", "unset CUDA_HOME"),
        ("CUDA_PATH", "warn", "unset CUDA_PATH"),
        ("LD_PRELOAD", "warn", "unset LD_PRELOAD"),
        ("TRITON_PTXAS_PATH", "warn", "unset TRITON_PTXAS_PATH"),
    ]
    assert "libcublas.so.12" in checks[0].detail and "no folder" in checks[1].detail
    assert "libnccl" in checks[2].detail and "jemalloc" not in checks[2].detail
    (empty,) = cuda_variables({"CUDA_HOME": str(touch(tmp_path / "empty"))})
    assert empty.status == "ok"


def test_libraries_really_loaded_are_compared_with_the_wheels(tmp_path: Path) -> None:
    wheels = touch(tmp_path / "site" / "nvidia" / "cu13" / "lib", "libcudart.so.13").parents[2]
    inside = {"libcudart.so.13": str(wheels / "nvidia" / "cu13" / "lib")}
    outside = {"libcudart.so.13": "/usr/local/cuda/lib64"}
    assert [check.status for check in loaded_libraries(inside, [wheels])] == ["ok"]
    (check,) = loaded_libraries(outside, [wheels])
    assert check.status == "warn" and "/usr/local/cuda/lib64" in check.detail
    # No wheel brings it: torch was built against the system's toolkit, which then shadows nothing.
    (system,) = loaded_libraries(outside, [touch(tmp_path / "bare")])
    assert system.status == "ok"


def test_a_misspelt_variable_of_ours_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings() == []
    monkeypatch.setenv("PRONGHORN_DEVCE", "0")
    (check,) = settings()
    assert check.status == "fail" and "PRONGHORN_DEVICE" in check.detail
