"""The suite on scripts that stand for peers: what is passed on, what is absent and said, what is stopped in time."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite as module
from benchmarks.results import peer_results
from benchmarks.suite import Suite, run
from benchmarks.suite_jobs import TOPICS, Peer, Topic

PEER = "import sys, json; print('RESULT', json.dumps({'tok_s': 7, 'given': sys.argv[1:]}))"
OURS = """
import json, pathlib, sys
from benchmarks.results import arguments, peer_results
parser = arguments("")
parser.add_argument("--model")
parser.add_argument("--speed", type=float, default=10)
args = parser.parse_args()
assert not args.peer or peer_results(args.peer)["good"][0]["tok_s"] == 7
row = {"case": "sft/x", "impl": "pronghorn", "metric": "tokens_per_s", "value": args.speed}
out = args.out / "gpu" / "MODULE.json"
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps({"rows": [row], "absent": args.absent, "peer": args.peer}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {
        "good.py": PEER,
        "bad.py": "print('what went wrong'); raise SystemExit(3)",
        "mute.py": "print('no result here')",
        "slow.py": "import time; time.sleep(60)",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def topic_of(*peers: Peer) -> Topic:
    return Topic(
        "sft", "fake", peers, ("--speed", "10"), (), ("--speed", "9"), "sft/x", "tokens_per_s", lambda r: r["tok_s"]
    )


def suite_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    fake = folder / "benchmarks_fake.py"
    fake.write_text(OURS.replace("MODULE", "fake"))
    plain = module.run

    def redirected(name: str, command: list[str], log: Path, timeout: float) -> Any:
        """Pronghorn's module is the stand-in file."""
        if command[1:3] == ["-m", "benchmarks.fake"]:
            command = [sys.executable, str(fake), *command[3:]]
        return plain(name, command, log, timeout)

    monkeypatch.setattr(module, "run", redirected)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    args = argparse.Namespace(
        model=Path("m"), peers=folder, dataset=None, out=folder / "out", commit="abc", long=False, no_anchor=False,
        resume=False,
    )  # fmt: skip
    return Suite(args)


def test_peers_reach_our_json_and_anchors_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(folder, monkeypatch)
    good = Peer("good", "good.py", (), ("--impl", "good", "--bs", "2"), anchor=True)
    absent = Peer("absent", "good.py", ("no-such-distribution",), ("--impl", "absent"))
    bad = Peer("bad", "bad.py", (), ("--impl", "bad", "--bs", "8"))
    mute = Peer("mute", "mute.py", (), ("--impl", "mute", "--bs", "1"))
    suite.run(topic_of(good, absent, bad, mute))
    assert suite.failed == []
    assert suite.results.absent == {
        "absent": "not installed: no-such-distribution",
        "bad --bs 8": "ended with 3: what went wrong",
        "mute --bs 1": "printed no RESULT line",
    }
    written = json.loads((folder / "out" / "gpu" / "fake.json").read_text())
    assert written["absent"] == [f"{name}={why}" for name, why in suite.results.absent.items()]
    (log,) = written["peer"]
    assert peer_results([log])["good"][0]["given"] == ["--model", "m", "--impl", "good", "--bs", "2"]
    rows = {(row.impl, row.metric): row.value for row in suite.results.rows}
    assert rows[("pronghorn", "first")] == 10 and rows[("pronghorn", "again")] == 9
    assert rows[("pronghorn", "ratio")] == 0.9 and rows[("good", "ratio")] == 1


def test_a_sitting_that_was_cut_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Peer("good", "good.py", (), ("--impl", "good", "--bs", "2"), anchor=True)
    bad = Peer("bad", "bad.py", (), ("--impl", "bad", "--bs", "8"))
    suite_of(folder, monkeypatch).peer("sft", good, 0)
    suite_of(folder, monkeypatch).peer("sft", bad, 1)
    (folder / "good.py").write_text("raise SystemExit('ran again')")
    suite = suite_of(folder, monkeypatch)
    suite.args.resume = True
    first, failed = suite.peer("sft", good, 0), suite.peer("sft", bad, 1)
    assert first is not None and first.results()[0]["tok_s"] == 7 and failed is None
    assert "bad --bs 8" in suite.results.absent
    suite.args.resume = False
    assert suite.peer("sft", good, 0) is None


def test_a_benchmark_of_ours_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(folder, monkeypatch)
    (folder / "benchmarks_fake.py").write_text("raise SystemExit('broken')")
    suite.run(topic_of())
    (failed,) = suite.failed
    assert "broken" in failed and "sft-pronghorn.log" in failed


def test_a_process_is_ended_at_its_time(folder: Path) -> None:
    ran = run("slow", [sys.executable, str(folder / "slow.py")], folder / "log", timeout=1.0)
    assert ran.why == "took longer than 1 s" and ran.seconds < 20


def test_every_topic_fits_its_scripts() -> None:
    for topic in TOPICS.values():
        anchors = [peer for peer in topic.peers if peer.anchor]
        assert len(anchors) == 1 and not anchors[0].long
        for peer in topic.peers:
            assert peer.options[0] == "--impl"
    steps = [dict(zip(p.options[::2], p.options[1::2])) for p in TOPICS["sft"].peers_of(long=False)]
    assert all(int(s["--steps"]) - 2 >= 5 for s in steps)
