"""What this machine's GPU does with this project, in one report, in about five minutes:

    python tests/gpu/run.py [--out FOLDER]

Each part is a process of its own with a limit of its own, so a part that fails, hangs or loses the GPU costs no other part anything.
What a part has found stays, also where it is stopped. It ends in a table; `report.txt` in the folder is what to send back.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from noting import LINES

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    "Tests that run together."
    name: str
    limit: float  # seconds
    tests: tuple  # as pytest takes them, in this folder
    which: str = ""  # of them, as pytest's option `-k` takes it

    def command(self):
        "What runs them."
        chosen = ["-k", self.which] if self.which else []
        return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", *chosen, *(str(HERE/test) for test in self.tests)]


PARTS = (  # what matters most comes first: the later ones have what is left of the time
    Part("kernels", 80, ("test_gpu.py",), "machine or nobody or moved or numerical or (exact and (llama or gemma2 or mistral))"),
    Part("speed", 110, ("test_speed.py::test_speed",)),
    Part("jobs", 100, ("test_gpu.py",), "job or memory"),
    Part("steps", 90, tuple(f"test_speed.py::test_{name}" for name in ("first_step", "waits", "launches"))),
    Part("other models", 90, ("test_gpu.py",), "chunks or answers or (exact and (qwen2 or gpt2 or gpt_oss))"),
    Part("Liger", 60, ("test_gpu.py::test_liger",)))


@dataclass(frozen=True)
class Outcome:
    "What came of a part."
    part: Part
    seconds: float
    ended: str  # how the process ended, in words
    tests: tuple  # of {"test", "outcome", "reason"}
    figures: tuple  # of three texts each: what, of what, a figure
    log: str

    @property
    def well(self) -> bool:
        "Did all of it pass?"
        return not self.ended and not any(test["outcome"] == "failed" for test in self.tests)

    def __str__(self):
        counts = Counter(test["outcome"] for test in self.tests)
        words = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items(), reverse=True)) or "nothing was run"
        return "; ".join(filter(None, [words, self.ended]))


def wait_for(process, limit):
    "How a process ended, in words; \"\" where it ended as pytest does. One that takes too long is ended with all it has started."
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {limit:.0f} s"
    return "" if code in (0, 1) else f"exit status {code}"


def noted(path):
    "What a part has noted; a line that isn't whole is left out."
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def run_part(part, limit, folder):
    "Run a part in a process of its own."
    if limit < 10:
        return Outcome(part, 0.0, "no time was left", (), (), "")
    name = part.name.replace(" ", "_")
    lines, log = folder/f"{name}.jsonl", folder/f"{name}.log"
    lines.write_text("", encoding="utf-8")
    start = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(part.command(), env=os.environ | {LINES: str(lines)}, cwd=HERE.parent.parent,
                                   stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        ended = wait_for(process, limit)
    found = noted(lines)
    tests, figures = (tuple(line for line in found if key in line) for key in ("test", "figure"))
    return Outcome(part, time.monotonic() - start, ended, tests, tuple(line["figure"] for line in figures),
                   log.read_text(encoding="utf-8", errors="replace"))


def as_table(rows):
    "Texts in columns."
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def report(outcomes):
    "What to send back, as text: the ends of the logs of parts that failed, what failed, the figures, and a line a part."
    said = []
    for outcome in outcomes:
        if not outcome.well:
            said += [f"== the end of the log of {outcome.part.name}", *outcome.log.splitlines()[-60:], ""]
    failed = [[o.part.name, test["test"], test["reason"]] for o in outcomes for test in o.tests if test["outcome"] == "failed"]
    figures = [row for outcome in outcomes for row in outcome.figures]
    parts = [[o.part.name, f"{o.seconds:.0f} s", str(o)] for o in outcomes]
    for heading, rows in (("what failed", failed), ("figures", figures), ("parts", parts)):
        if rows:
            said += [f"== {heading}", *as_table(rows), ""]
    return "\n".join(said)


def run_all(parts, seconds, folder):
    "Run parts one after the other, and write the report anew after each; what each came to."
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + seconds, []
    for part in parts:
        outcomes.append(run_part(part, min(part.limit, end - time.monotonic()), folder))
        print(f"{part.name}: {outcomes[-1]}", flush=True)
        (folder/"report.txt").write_text(report(outcomes), encoding="utf-8")
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder for the report (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=290, help="for all parts together, at most (default: %(default)s)")
    asked = parser.parse_args()
    outcomes = run_all(PARTS, asked.seconds, asked.out.absolute())
    print("", report(outcomes), f"send back {asked.out/'report.txt'}", sep="\n")
    sys.exit(not all(outcome.well for outcome in outcomes))


if __name__ == "__main__":
    main()
