"""Run the tests marked `gpu`, one file after the other, each in a process of its own.

A file that hangs or dies takes no other along, and what came before it is known.
"""

from __future__ import annotations

import functools
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_results import ROOT, Report, Result, run_python
from text_table import text_table

# In this order: what the others rely on comes first.
FILES = ("facts", "head", "scoring", "attention", "training")

# Seconds after which a file counts as hanging; the last one gets all that is left.
_LIMIT = 210.0


def run_tests(report: Report) -> None:
    """Add one result for each file; a failure fails the report."""
    for name in FILES:
        done = report.add(f"tests: {name}", functools.partial(_run_file, report, name))
        report.failed = report.failed or (done is not None and bool(done["failures"]))
        print("\n".join(f"  FAILED {failure}" for failure in done["failures"]) if done else "", flush=True)


def _run_file(report: Report, name: str, seconds: float) -> Result:
    junit, log = report.work / f"{name}.xml", report.path.with_suffix(".log")
    words = ["-m", "pytest", "-m", "gpu", "-v", "--no-header", "-o", "addopts=--strict-markers"]
    words += ["-p", "no:cacheprovider", f"--junitxml={junit}", str(ROOT / f"tests/test_gpu_{name}.py")]
    limit = seconds if report.dry or name == FILES[-1] else min(seconds, _LIMIT)
    try:
        run_python(words, seconds=limit, log=log, env={"GPU_REHEARSAL": "1"} if report.dry else {})
    except ValueError:
        if not junit.exists():
            raise
    except subprocess.TimeoutExpired:
        report.failed = report.failed or limit < seconds
        raise
    return read_junit(junit)


def read_junit(path: Path) -> Result:
    """Return how many tests passed, the failures with the ends of their messages, and the reasons of what was skipped."""
    passed, failures, skipped = 0, [], dict[str, int]()
    for case in ElementTree.parse(path).iter("testcase"):
        problem = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        omitted = case.find("skipped")
        if problem is not None:
            failures.append(f"{case.get('name')}: {' '.join((problem.get('message') or '').split())[:300]}")
        elif omitted is not None:
            reason = omitted.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {"passed": passed, "failures": failures, "skipped": skipped}


def tests_table(report: Report) -> str:
    """Return one line for each file, then the failures and the reasons of what was skipped."""
    found = {name: result for name, result in report.results.items() if name.startswith("tests: ")}
    rows = [
        [name, str(one["passed"]), str(len(one["failures"])), str(sum(one["skipped"].values()))]
        for name, one in found.items()
    ]
    failures = [f"FAILED {one}" for result in found.values() for one in result["failures"]]
    reasons = [f"skipped {n}: {why}" for result in found.values() for why, n in result["skipped"].items()]
    return "\n".join([text_table(["file", "passed", "failed", "skipped"], rows), *failures, *reasons])
