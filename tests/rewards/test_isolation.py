"""Reward functions in workers: TRL's contract kept, faults by policy, hangs and deaths named, nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from pronghorn.config.errors import ConfigError
from pronghorn.rewards.errors import RewardError
from pronghorn.rewards.isolation import IsolatedReward, isolated
from pronghorn.rewards.kill import descendants
from pronghorn.rewards.process import WorkerProcess
from pronghorn.rewards.runner import RewardRunner

from . import functions

PROMPTS = ["a", "b", "c"]
COMPLETIONS = ["one", "three", "fifth"]
IDS = [[1], [2, 3], [4, 5, 6]]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Every test ends with the processes, file descriptors and threads that it began with."""
    before = _held()
    yield
    assert _held() == before


def _held() -> tuple[int, int, int]:
    return len(descendants(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture
def make() -> Iterator[Any]:
    made: list[RewardRunner] = []

    def runner(*funcs: Any, **kwargs: Any) -> RewardRunner:
        made.append(RewardRunner(list(funcs), **kwargs))
        return made[-1]

    yield runner
    for one in made:
        one.close()


def texts(runner: RewardRunner, completions: list[str], **kwargs: Any) -> torch.Tensor:
    columns = kwargs.pop("columns", {})
    return runner.score(["p"] * len(completions), completions, [[1]] * len(completions), columns, **kwargs)


def test_the_contract_is_the_same_in_workers(make: Any) -> None:
    """The same functions in the process are the oracle: rewards, None, columns and every log."""
    columns = {"answer": ["1", "skip", "2.5"]}
    state = SimpleNamespace(global_step=7, log_history=[{"loss": 1.0}], odd=object())
    seen = []
    for workers in (0, 1, 2):
        extra: dict[str, list[Any]] = {}
        metrics: list[tuple[str, float]] = []
        runner = make(functions.contract, functions.length, functions.later, workers=workers)
        rewards_BF = runner.score(
            PROMPTS, COMPLETIONS, IDS, columns, state=state, log_extra=extra.__setitem__,
            log_metric=lambda *given, metrics=metrics: metrics.append(given),
        )  # fmt: skip
        seen.append((rewards_BF[:, :2], extra, set(metrics)))
        assert runner.names == ["contract", "length", "later"]
    assert seen[0][0][:, 0].isnan().tolist() == [False, True, False]
    assert seen[0][1]["seen"] == ["one/a", "three/b", "fifth/c"] and seen[0][2] == {("step", 7.0)}
    for workers in (1, 2):
        assert_close(seen[workers][0], seen[0][0], rtol=0, atol=0, equal_nan=True)
        assert seen[workers][1:] == seen[0][1:]


def test_the_log_history_is_whole_in_workers_and_sent_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it grows, after a worker's death, for a run that went back, and where an entry cannot travel."""
    sizes: list[int] = []
    ask = WorkerProcess.ask
    monkeypatch.setattr(WorkerProcess, "ask", lambda *given: (sizes.append(len(given[1])), ask(*given))[1])
    state = SimpleNamespace(shift=0, log_history=[{"loss": i} for i in range(400)])
    runner = make(functions.history, workers=2, on_error="zero")

    def found(*said: str) -> list[float]:
        rewards: list[float] = texts(runner, list(said) or ["a", "b"], state=state).flatten().tolist()
        return rewards

    assert found() == [400, 400]
    first, sizes[:] = max(sizes), []
    for number in range(401, 404):
        state.log_history.append({"loss": number - 1})
        assert found() == [number, number]
    assert first > 2000 and max(sizes) < 400, (first, sizes)
    assert found("exit", "b") == [0, 403]
    assert found() == [403, 403]  # the worker in the dead one's place has all of it too
    state.shift, state.log_history = 7, [{"loss": i + 7} for i in range(5)]
    assert found() == [5, 5]
    state.log_history = [{"loss": i + 7} for i in range(3)] + state.log_history[3:] + [{"loss": 12}]
    assert found() == [6, 6]
    state.log_history.append({"loss": object()})
    assert found() == [-1, -1]
    state.log_history[-1] = {"loss": 13}
    assert found() == [7, 7]


def test_workers_are_light_blind_to_gpus_and_kept(make: Any) -> None:
    extra: dict[str, list[Any]] = {}
    runner = make(functions.environment, functions.pids, workers=1)
    first = texts(runner, ["x"], log_extra=extra.__setitem__)
    assert extra == {"torch": [False], "gpus": [""], "main": [None]} and first[0, 0] == 1.0
    assert first[0, 1] != os.getpid() and texts(runner, ["x"])[0, 1] == first[0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise", "raised ValueError: bad digit"),
        ("memory", "raised MemoryError"),
        ("exit", "ended by itself with exit status 3 while running"),
        ("sysexit", "ended by itself with exit status 4 while running"),
        ("segfault", "died of SIGSEGV while running"),
        ("killed", "died of SIGKILL .out of memory.. while running"),
        ("hang", r"ran over its timeout of 0.2 s"),
        ("spin", r"ran over its timeout of 0.2 s"),
        ("nan", "gave NaN; give None"),
        ("inf", "gave inf, which is not finite"),
        ("text", "gave str '1.0', which is not a number"),
    ],
)  # fmt: skip
def test_raise_names_function_row_and_completion_and_the_pool_goes_on(make: Any, text: str, message: str) -> None:
    reward = isolated(functions.faulty, timeout=0.4)
    runner = make(reward)
    with pytest.raises(RewardError, match=message) as caught:
        texts(runner, ["fine", "good", text, "ok"])
    assert (caught.value.function, caught.value.row, caught.value.completion) == ("faulty", 2, text)
    if text == "raise":
        assert 'raise ValueError("bad digit")' in str(caught.value.__cause__)  # the worker's own traceback
    assert texts(runner, ["fine"]).tolist() == [[4.0]]


@pytest.mark.parametrize("text", ["raise", "hang", "exit", "nan", "inf", "text"])
@pytest.mark.parametrize("where", ["worker", "process"])
def test_nan_and_zero_excuse_the_failing_row_alone(
    make: Any, text: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    if where == "process" and text in ("hang", "exit"):
        pytest.skip("only a worker survives it")
    for on_error, becomes in (("nan", [[float("nan"), float("nan")]]), ("zero", [[0.0, float(len(text))]])):
        workers = {"workers": 1, "timeout": 0.8} if where == "worker" else {}
        runner = make(functions.faulty, functions.length, on_error=on_error, **workers)
        metrics: dict[str, float] = {}
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="pronghorn"):
            rewards_BF = texts(runner, ["fine", text, "go"], log_metric=metrics.__setitem__)
        expected = torch.tensor([[4.0, 4.0], *becomes, [2.0, 2.0]])
        assert_close(rewards_BF, expected, rtol=0, atol=0, equal_nan=True)
        assert metrics == {"rewards/faulty/failed": pytest.approx(1 / 3), "rewards/length/failed": 0.0}
        assert len(caplog.records) == 1 and "1 of 3 completions" in caplog.text and f"{text!r}" in caplog.text
        runner.close()


@pytest.mark.parametrize("on_error", ["raise", "nan", "zero"])
def test_a_wrong_length_is_an_error_under_every_policy(make: Any, on_error: Any) -> None:
    for workers in (0, 1):
        with pytest.raises(RewardError, match="'short'.*returned 2 rewards for 3 completions"):
            texts(make(functions.short, workers=workers, on_error=on_error), COMPLETIONS)


def test_a_function_that_does_not_fit_is_an_error_under_every_policy(make: Any) -> None:
    with pytest.raises(RewardError, match=r"'narrow'.*\*\*kwargs"):
        texts(make(lambda completions: [], names=["narrow"], workers=1, on_error="nan"), ["x"])


def test_a_hang_is_killed_with_all_its_children_and_named(make: Any, tmp_path: Path) -> None:
    """Also a child in a session of its own, and a grandchild whose parent has ended."""
    runner = make(isolated(functions.spawns_and_hangs, timeout=0.8))
    with pytest.raises(RewardError, match="'spawns_and_hangs'.*timeout of 0.4 s"):
        texts(runner, ["x"], columns={"folder": [str(tmp_path)]})
    started = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(started) == 3 and not any(_runs(pid) for pid in started)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def _ends(pid: int) -> bool:
    """Whether it ends within a few seconds."""
    until = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not _runs(pid)


def test_functions_run_at_the_same_time(make: Any, tmp_path: Path) -> None:
    """Each waits for the other: one after another they would run over their timeouts."""

    def meets(name: str, other: str) -> Any:
        def meet(completions: list[str], folder: list[str], **kwargs: Any) -> list[float]:
            from pathlib import Path
            from time import sleep

            (Path(folder[0]) / name).touch()
            while not (Path(folder[0]) / other).exists():
                sleep(0.005)
            return [1.0]

        return isolated(meet, timeout=5, name=name)

    runner = make(meets("first", "second"), meets("second", "first"))
    assert texts(runner, ["x"], columns={"folder": [str(tmp_path)]}).tolist() == [[1.0, 1.0]]


def test_the_caller_is_free_between_start_and_result(make: Any) -> None:
    def slow(completions: list[str], **kwargs: Any) -> list[float]:
        import time

        time.sleep(0.3)
        return [1.0] * len(completions)

    runner = make(slow, workers=1)
    texts(runner, ["x"])  # the worker runs
    began = time.monotonic()
    with runner.start(["p"], ["x"], [[1]], {}) as pending:
        assert time.monotonic() - began < 0.15
        time.sleep(0.3)
        assert pending.result().tolist() == [[1.0]] and time.monotonic() - began < 0.55


def test_workers_split_the_rows_and_faults_keep_their_row(make: Any) -> None:
    runner = make(functions.pids, workers=2)
    assert len(set(texts(runner, ["x"] * 4).flatten().tolist())) == 2
    with pytest.raises(RewardError, match="bad digit") as caught:
        texts(make(functions.faulty, workers=2), ["a", "b", "c", "raise"])
    assert caught.value.row == 3


def test_an_interrupt_kills_what_runs(make: Any) -> None:
    runner = make(isolated(functions.faulty, timeout=60), functions.later)
    texts(runner, ["x"])
    (pid,) = runner.funcs[0].pool.pids
    timer = threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    # A suite that a script runs in the background was started with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            texts(runner, ["spin"])
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5 and not _runs(pid)
    assert texts(runner, ["x"])[0, 0] == 1.0  # and goes on


def test_close_during_a_call_ends_it(make: Any) -> None:
    reward = isolated(functions.faulty, timeout=60)
    pending = reward.submit({"completions": ["hang"]})
    time.sleep(0.3)
    reward.close()
    with pytest.raises(RewardError, match="faulty"):
        pending.result()


def test_a_script_that_closes_nothing_ends_and_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from pronghorn.rewards import isolated\nfrom tests.rewards import functions\n"
        "reward = isolated(functions.length)\nreward(completions=['x'])\nprint(*reward.pool.pids)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=60)
    assert ran.returncode == 0 and ran.stderr == ""
    assert _ends(int(ran.stdout))


@pytest.mark.parametrize("text", ["idle", "spin"])
def test_workers_end_when_the_trainer_is_killed(tmp_path: Path, text: str) -> None:
    """`kill -9` of the process that owns them, while idle and while a function holds the interpreter."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time\nfrom pronghorn.rewards import isolated\nfrom tests.rewards import functions\n"
        "reward = isolated(functions.faulty, timeout=60)\nreward(completions=['x'])\n"
        "print(*reward.pool.pids, flush=True)\n"
        f"reward(completions=[{text!r}])\ntime.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=env) as p:
        assert p.stdout
        pid = int(p.stdout.readline())
        time.sleep(0.1)
        assert _runs(pid)
        p.kill()
    assert _ends(pid), "the worker outlived its parent"


def test_a_worker_killed_while_idle_is_replaced(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """That is no fault of any completion: nothing is raised."""
    runner = make(functions.faulty, workers=1)
    texts(runner, ["x"])
    os.kill(runner.funcs[0].pool.pids[0], signal.SIGKILL)
    time.sleep(0.1)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        assert texts(runner, ["fine", "ok"]).tolist() == [[4.0], [2.0]]
    assert "'faulty' died of SIGKILL" in caplog.text and "starting another" in caplog.text


def test_a_module_that_does_not_import_is_said(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vanishing.py").write_text("def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    import vanishing  # type: ignore[import-not-found]

    (tmp_path / "vanishing.py").unlink()
    with pytest.raises(RewardError, match="'reward'.*cannot be loaded in a worker process: ModuleNotFoundError"):
        texts(make(isolated(vanishing.reward, on_error="nan")), ["x"])


def test_rows_that_do_not_pickle_name_their_column(make: Any) -> None:
    with pytest.raises(RewardError, match="column 'lock' cannot be sent"):
        texts(make(functions.length, workers=1), ["x"], columns={"lock": [threading.Lock()]})


def test_isolated_is_a_reward_function_by_itself() -> None:
    reward = isolated(functions.later, name="slow")
    assert isinstance(reward, IsolatedReward) and reward.__name__ == "slow"
    assert reward(prompts=["a", "b"], completions=["x", "y"], completion_ids=[[1], [2]]) == [None, 0.5]
    reward.close()


def test_settings_are_checked() -> None:
    for kwargs, message in (
        ({"timeout": 0}, "timeout=0 is out of range"),
        ({"workers": 0}, "workers=0"),
        ({"on_error": "none"}, "on_error='none' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            isolated(functions.length, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="plain reward function"):
        isolated(isolated(functions.length))
    with pytest.raises(ConfigError, match="reward_timeout=3 has no effect in the process"):
        RewardRunner(functions.length, timeout=3)
    with pytest.raises(ConfigError, match="reward_on_error='skip'"):
        RewardRunner(functions.length, on_error="skip")  # type: ignore[arg-type]
