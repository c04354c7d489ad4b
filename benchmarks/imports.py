"""How long `import vismem` takes, in new processes one after another, compared with torch alone.

`--python` names the interpreter of another environment, such as one with only the wheel installed: with extras,
transformers and peft load more. Times are of whole processes, Python's start included: wall-clock time, and CPU time,
which other programs on the machine affect less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from common import Spread, turned

OUT = Path(__file__).resolve().parent.parent / "results" / "import_time.json"
LIMIT = 3.0  # seconds, for all but the demo
NAMES = "Answer, Invocation, Request, RequestQueue, VisMem, VisMemConfig, VisMemOutput, invocation"
RUNS = {
    "python": ["-c", "pass"],
    "torch": ["-c", "import torch"],
    "vismem": ["-c", "import vismem"],
    "names": ["-c", f"from vismem import {NAMES}"],
    "help": ["-m", "vismem", "--help"],
    "demo": ["-m", "vismem", "ask", "{picture}", "What does row 1 cost with its promotion?"],
}
FACTS = """
import importlib.metadata as m, json, os, platform
found = {"cores": os.cpu_count(), "python": platform.python_version()}
found["versions"] = {n: m.version(n) for n in ("vismem", "torch", "transformers", "peft")}
found["packages"] = len({d.metadata["Name"] for d in m.distributions()})
lines = open("/proc/cpuinfo").read().splitlines() if os.path.exists("/proc/cpuinfo") else []
found["processor"] = next((l.split(":")[1].strip() for l in lines if l.startswith("model name")), platform.machine())
print(json.dumps(found))
"""


def seconds(words: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one process, from start to end."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return end - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vismem bench imports", description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="interpreter (default: this one)")
    parser.add_argument("--environment", default="dev", metavar="TEXT", help="a description of what is installed there")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of each, after a warm-up round")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/import_time.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {options.rounds}")

    picture = str(Path(__file__).resolve().parent.parent / "examples" / "shelf.png")
    words = {name: [options.python, *(w.format(picture=picture) for w in run)] for name, run in RUNS.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
    load = os.getloadavg()[0]
    for turn in range(options.rounds + 1):
        print(f"round {turn}/{options.rounds}", file=sys.stderr, flush=True)
        for name in turned(list(RUNS), turn):
            spent = seconds(words[name])
            if turn:
                samples[name].append(spent)
    facts = json.loads(subprocess.run([options.python, "-c", FACTS], check=True, capture_output=True).stdout)
    rows = {
        name: {
            what: vars(Spread.of(list(each)))
            for what, each in zip(("seconds", "busy"), zip(*values, strict=True), strict=True)
        }
        for name, values in samples.items()
    }
    found = {
        "benchmark": "imports",
        "machine": {name: facts[name] for name in ("processor", "cores")},
        "limit": LIMIT,
        "environments": {},
    }
    if options.out.is_file():
        found["environments"] = json.loads(options.out.read_text(encoding="utf-8"))["environments"]
    other = "" if options.python == sys.executable else "--python FILE "
    command = f"vismem bench imports {other}--environment {options.environment!r} --rounds {options.rounds}"
    kept = {"command": command, **{name: facts[name] for name in ("python", "versions", "packages")}}
    found["environments"][options.environment] = {**kept, "load_before": round(load, 2), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        clock, busy = row["seconds"], row["busy"]
        print(f"{name:8} {clock['median']:6.2f} s [{clock['q1']:.2f}, {clock['q3']:.2f}], busy {busy['median']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
