"""Pronghorn and its peers on one machine in one sitting: every script as a process of its own, one after another.

    python -m benchmarks.suite --model FOLDER --peers PEERS_DIR --dataset FOLDER --what sft|decode|grpo|all --out DIR

PEERS_DIR holds ``sft_step.py``, ``seed_flow.py`` and ``gen_bench.py`` (each prints ``RESULT {json}``). Of a topic the
peers run first; what they printed goes to Pronghorn's benchmark by ``--peer``, and so into the JSON beside ours. Then
an anchor, one case of Pronghorn's and one of a peer's, runs again: ``suite.json`` has both figures of both, and a
machine that changed its speed shows. A peer that is not installed, fails or takes too long is named in one line and
under ``"absent"`` in both JSON files. ``--long`` adds the cases that take minutes. Logs lie under ``DIR/logs``. A
sitting that was cut goes on with ``--resume``: what had ended well there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Results, current_commit
from benchmarks.suite_jobs import TOPICS, Peer, Topic


@dataclasses.dataclass
class Ran:
    """How a process ended: ``why`` is empty where all went well."""

    log: Path
    seconds: float
    why: str = ""

    def results(self) -> list[dict[str, Any]]:
        """What it printed as ``RESULT {json}``."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("RESULT ")]
        return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def run(name: str, command: list[str], log: Path, timeout: float) -> Ran:
    """Run to its end or its time's, with everything it says in ``log``; one line says how it went."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    if not installed("flashinfer-python"):
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    begun = time.perf_counter()
    why = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # a peer's own workers too
            process.wait()
            why = f"took longer than {timeout:.0f} s"
        else:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            why = "" if code == 0 else f"ended with {code}: {said[-1][:200] if said else 'said nothing'}"
    ran = Ran(log, time.perf_counter() - begun, why)
    print(f"suite: {name:28s} {ran.seconds:6.1f} s  {why or 'done'}", flush=True)
    if not why:
        _ended_well(log).write_text(f"{ran.seconds}\n")
    return ran


def _ended_well(log: Path) -> Path:
    """The file that stands beside the log of a process that ended well, with its seconds."""
    return log.with_suffix(".done")


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class Suite:
    """One sitting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.commit = args.commit or current_commit()
        self.results = Results("suite", (), self.commit)
        self.failed: list[str] = []

    def once(self, name: str, command: list[str], log: Path, timeout: float) -> Ran:
        """:func:`run`, unless a sitting that goes on had it before."""
        done = _ended_well(log)
        if self.args.resume and done.exists():
            return Ran(log, float(done.read_text()))
        done.unlink(missing_ok=True)
        return run(name, command, log, timeout)

    def peer(self, topic: str, peer: Peer, number: int | str) -> Ran | None:
        """Run one of a peer's cases, or say why not."""
        absent = self.results.absent
        missing = [name for name in peer.needs if not installed(name)]
        if missing:
            if peer.name not in absent:
                absent[peer.name] = f"not installed: {', '.join(missing)}"
                print(f"suite: {peer.name} is left out, {absent[peer.name]}", flush=True)
            return None
        script = self.args.peers / peer.script
        command = [sys.executable, str(script), "--model", str(self.args.model), *peer.options]
        log = self.args.out / "logs" / f"{topic}-{peer.name}-{number}.log"
        ran = self.once(f"{peer.name} {' '.join(peer.options[2:])}", command, log, peer.timeout)
        if not ran.why and not ran.results():
            ran.why = "printed no RESULT line"
        if ran.why:
            absent[f"{peer.name} {' '.join(peer.options[2:])}"] = ran.why
            return None
        return ran

    def ours(self, topic: Topic, options: tuple[str, ...], peers: list[str], again: bool) -> dict[str, float]:
        """Pronghorn's benchmark of the topic, and what it wrote of the anchor's case."""
        out = self.args.out / "again" if again else self.args.out
        command = [sys.executable, "-m", f"benchmarks.{topic.module}", "--model", str(self.args.model)]
        command += ["--out", str(out), "--commit", self.commit, *options]
        if topic.dataset:
            command += ["--dataset", str(self.args.dataset)]
        for peer in peers:
            command += ["--peer", peer]
        for name, why in self.results.absent.items() if not again else ():
            command += ["--absent", f"{name}={why}"]
        name = f"pronghorn {topic.name}" + (" again" if again else "")
        log = self.args.out / "logs" / f"{topic.name}-pronghorn{'-again' if again else ''}.log"
        ran = self.once(name, command, log, topic.timeout)
        if ran.why:
            self.failed.append(f"{name}: {ran.why} ({log})")
            return {}
        written = sorted(out.glob(f"*/{topic.module}.json"), key=lambda path: path.stat().st_mtime)[-1]
        rows = [row for row in json.loads(written.read_text())["rows"] if row["impl"] == "pronghorn"]
        return {row["metric"]: row["value"] for row in rows if row["case"] == topic.anchor_case}

    def run(self, topic: Topic) -> None:
        """Peers, ours, and both anchors again."""
        long = self.args.long
        ran = [(peer, self.peer(topic.name, peer, i)) for i, peer in enumerate(topic.peers_of(long))]
        first = next((found for peer, found in ran if found is not None and peer.anchor), None)
        logs = [f"{peer.name}={found.log}" for peer, found in ran if found is not None]
        before = self.ours(topic, topic.options_of(long), logs, again=False)
        if self.args.no_anchor:
            return
        again = self.ours(topic, topic.anchor, [], again=True) if before else {}
        self.anchor(topic, "pronghorn", before.get(topic.metric), again.get(topic.metric))
        peer = next((peer for peer, found in ran if found is not None and peer.anchor), None)
        if first is None or peer is None:
            return
        second = self.peer(topic.name, peer, "again")
        if second is not None:
            self.anchor(topic, peer.name, topic.read(first.results()[0]), topic.read(second.results()[0]))

    def anchor(self, topic: Topic, impl: str, first: float | None, again: float | None) -> None:
        if first is None or again is None:
            return
        self.results.add(f"anchor/{topic.anchor_case}", impl, first=first, again=again, ratio=again / first)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True, help="folder of the peers' scripts")
    parser.add_argument("--dataset", type=Path, default=None, help="GSM8K's folder, for grpo")
    parser.add_argument("--what", choices=(*TOPICS, "all"), default="all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--long", action="store_true", help="also the cases that take minutes each")
    parser.add_argument("--resume", action="store_true", help="go on with a sitting that was cut, in its --out")
    parser.add_argument("--no-anchor", action="store_true", help="nothing is measured twice")
    args = parser.parse_args()
    topics = list(TOPICS.values()) if args.what == "all" else [TOPICS[args.what]]
    if args.dataset is None and any(topic.dataset for topic in topics):
        raise SystemExit("--what grpo needs --dataset, GSM8K's folder")
    if not args.peers.is_dir():
        raise SystemExit(f"--peers {args.peers} is no folder; give the one with sft_step.py and its kind")
    suite = Suite(args)
    for topic in topics:
        suite.run(topic)
    suite.results.write(args.out)
    if suite.failed:
        raise SystemExit("\n".join(suite.failed))


if __name__ == "__main__":
    main()
