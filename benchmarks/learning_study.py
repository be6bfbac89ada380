"""What a learning study has found so far, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pronghorn
from benchmarks.learning_plots import draw
from benchmarks.learning_summary import summarize, write_results
from pronghorn.config.errors import ConfigError

TINY = Path(pronghorn.__file__).parent / "assets" / "tiny-arithmetic"


class Study:
    """What was found so far, and its files."""

    def __init__(self, options: dict[str, Any], device: str, machine: str, commit: str) -> None:
        model = Path(options["model"])
        shipped = model.resolve() == TINY.resolve()
        parts = ["learning", "" if shipped else model.name, options["only"] or ""]
        self.name = "-".join(part for part in parts if part)
        self.path = Path(options["output"]) / f"{self.name}-{device}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.results = Path(options["results"]) / device / f"{self.name}.json"
        self.whole = options["only"] is None
        settings = {**options, "model": model.name, "machine": machine}
        if Path(settings["data"]).exists():
            settings["data"] = Path(settings["data"]).name
        for name in ("output", "results", "gsm8k", "budget", "preset", "add"):
            del settings[name]
        self.found: dict[str, Any] = {"settings": settings, "device": device, "commit": commit, "runs": []}
        record = model / "pretraining.json"
        if record.is_file():
            self.found["pretraining"] = json.loads(record.read_text())
        if options["add"]:
            self._take_up()

    def _take_up(self) -> None:
        """Keep the file's seeds; the ones that come are run beside them."""
        if not self.path.is_file():
            raise ConfigError(f"--add: there is no {self.path} to add to; leave it out")
        old = json.loads(self.path.read_text())
        for part in ("settings", "pretraining"):
            before, now = old.get(part, {}), self.found.get(part, {})
            unlike = [n for n in {**before, **now} if n != "seeds" and before.get(n) != now.get(n)]
            if unlike:
                raise ConfigError(
                    f"--add: {self.path.name} has {unlike[0]}={before.get(unlike[0])!r} in its {part} and this study "
                    f"{now.get(unlike[0])!r}; seeds of one study are run alike: leave --add out, or set it as it was"
                )
        seeds = [int(seed) for seed in self.found["settings"]["seeds"].split(",")]
        self.found["runs"] = [run for run in old["runs"] if run["seed"] not in seeds]
        kept = [run["seed"] for run in self.found["runs"]]
        self.found["settings"]["seeds"] = ",".join(str(seed) for seed in sorted([*kept, *seeds]))

    def running(self, seed: int, records: dict[str, list[dict[str, Any]]]) -> None:
        """Keep the steps of a seed that has not ended."""
        self.found["unfinished"] = {"seed": seed, "sides": records}
        self._write()

    def finished(self, seed: int, records: dict[str, list[dict[str, Any]]]) -> None:
        """Take a whole seed in; numbers and plot are those of all seeds so far."""
        self.found.pop("unfinished", None)
        self.found["runs"].append({"seed": seed, "sides": records})
        self.found |= summarize(self.found["runs"])
        self._write()
        if self.whole:
            write_results(self.found, self.results)
            draw(self.found, self.path.with_suffix(".png"))

    def _write(self) -> None:
        """The file is replaced whole, so that being killed leaves the one before."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self.path)
