"""Measure on one GPU what the documentation may claim: is it right (1), what does it cost beside TRL (2), and why (3).

    python benchmarks/gpu_report.py --part 1 --out results
    python benchmarks/gpu_report.py --part 2 --out results
    python benchmarks/gpu_report.py --part 3 --out results
    python benchmarks/gpu_report.py --part 2 --out results --dry     # the same steps with tiny sizes on the CPU

Each part takes less than --minutes (9.5), runs from the source tree without a package index, and needs nothing that
another part left. What does not fit into the time is listed as not measured. OUT/part-N.json and part-N.md are written
anew after each result, so that a part that is killed loses one measurement. A side is left out with its reason where its
package (TRL) cannot be imported.

Part 1 runs the tests marked `gpu`. Part 2 times 20 updates of 32 rows after 5 of warm-up, one process for each side,
on the same rows in the same order, and prints the claims with their verdicts. Part 3 measures the output layer, the
kinds of kernels in an update, single switches, scoring, and how far apart two ways to compute a score are.
Every page names card, versions and the rate of a large matrix product in the same call.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_claims import claims_table, side_table
from gpu_results import Report, Result, run_python
from gpu_scores import apart, numerics_table, read_scores
from gpu_tests import run_tests, tests_table
from gpu_workload import SIZES, layer_weights

HERE = Path(__file__).resolve().parent
_CLI = "from offline_kto.{module}.cli import {command}; {command}()"
_WARMUP = 5  # updates before the timed ones
_TRL_ENVIRONMENT = HERE / ".venv-trl/bin/python"


def facts(report: Report, seconds: float) -> Result:
    """Return card, versions, and the rate of a product of two large matrices in TFLOP/s."""
    log = report.work / "facts.log"
    run_python([HERE / "gpu_facts.py"], seconds=seconds, log=log)
    line = log.read_text(encoding="utf-8").splitlines()[-1]
    print(line)
    found: Result = json.loads(line)
    if found["memory"] is None and not report.dry:
        raise ValueError("no CUDA device; --dry runs the same steps on the CPU")
    return found


def command(module: str, name: str, *words: object) -> list[str | Path]:
    """Return the words that run a command of the project from the source tree."""
    return ["-c", _CLI.format(module=module, command=name), *map(str, words)]


@dataclass(frozen=True)
class Workload:
    """A model, rows, and a cache of their reference scores."""

    size: str
    model: Path
    data: Path
    cache: Path
    max_length: int
    batch: int


def make_workload(report: Report, size: str, *, seconds: float) -> Workload:
    """Write model and rows."""
    folder, batch = report.work / size, 4 if report.dry else 32
    words: list[str | Path] = [HERE / "gpu_workload.py", "--size", "tiny" if report.dry else size]
    words += [
        "--rows",
        str(batch * (4 if report.dry else _WARMUP + report.updates)),
        "--device",
        report.device,
        "--out",
        folder,
    ]
    run_python(words, seconds=seconds, log=report.work / f"{size}.log")
    return Workload(size, folder / "model", folder / "rows.jsonl", folder / "refs", 64 if report.dry else 1024, batch)


def score(report: Report, workload: Workload, out: Path, *, seconds: float, options: tuple[object, ...] = ()) -> Result:
    """Score the references with kto-precompute, and return rates."""
    words = command(
        "precompute",
        "precompute",
        *("--model", workload.model, "--data", workload.data, "--out", out, "--max-length", workload.max_length),
        *("--device", report.device, "--backend", "transformers", *options),
    )
    run_python(words, seconds=seconds, log=out.with_suffix(".log"))
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    spent, tokens = manifest["run"]["seconds"], manifest["run"]["tokens"]
    flops = 2 * layer_weights(SIZES["tiny" if report.dry else workload.size]) * tokens
    return {
        "scoring_seconds": spent,
        "tokens": tokens,
        "tokens_a_second": tokens / spent,
        "tflops": flops / spent / 1e12,
    }


def side(
    report: Report,
    workload: Workload,
    kind: str,
    *,
    seconds: float,
    name: str,
    options: Result | None = None,
    env: dict[str, str] | None = None,
    profile: bool = False,
    python: Path = Path(sys.executable),
) -> Result:
    """Time updates of one side in a process of its own."""
    out = report.work / f"{name.replace(' ', '-').replace('/', '-')}.json"
    warmup, updates = (1, 2) if report.dry else (_WARMUP, report.updates)
    words: list[str | Path] = [HERE / "gpu_side.py", kind, "--model", workload.model, "--data", workload.data]
    words += ["--cache", workload.cache, "--out", out, "--batch-size", str(workload.batch)]
    words += ["--max-length", str(workload.max_length), "--warmup", str(warmup), "--updates", str(updates)]
    where = {"device": "cpu"} if report.dry and kind == "ours" else {}
    words += ["--options", json.dumps({**where, **(options or {})}), *(["--profile"] if profile else [])]
    run_python(words, seconds=seconds, log=out.with_suffix(".log"), env=env, python=python)
    found: Result = json.loads(out.read_text(encoding="utf-8"))
    return found


def ready(report: Report, size: str, *, needs: float) -> Workload | None:
    """Return the workload of a size, with its references scored; None if that failed or there was no time."""
    made: list[Workload] = []

    def prepare(seconds: float) -> Result:
        begun = time.monotonic()
        made.append(make_workload(report, size, seconds=seconds))
        return score(report, made[0], made[0].cache, seconds=seconds - (time.monotonic() - begun))

    return made[0] if report.add(f"{size} scoring", prepare, needs=needs, always=True) is not None else None


Side = tuple[str, Result]

_AUTO: Side = ("ours auto", {})
_8192: Side = ("ours 8192", {"max_tokens": 8192})
_CHECKPOINTING: Side = ("ours 8192, checkpointing", {"max_tokens": 8192, "gradient_checkpointing": True})
_LEAN: Side = ("ours lean", {"memory": "lean"})
_TRL: Side = ("TRL cached", {})
_TRL_KEPT: Side = ("TRL cached, no checkpointing", {"gradient_checkpointing": False})
_TRL_LIVE: Side = ("TRL live", {"precompute_ref_log_probs": False})
_TRL_16: Side = ("TRL cached, bfloat16 weights", {"model_dtype": "bfloat16"})


def _with_lora(*sides: Side) -> list[Side]:
    return [(name, {**options, "lora_rank": 16}) for name, options in sides]


# In order of worth: what the claims need comes first, and what runs out of time is at the end.
ORDER: list[tuple[str, list[Side]]] = [
    ("0.5B", [_AUTO, _TRL, _8192, _TRL_KEPT, _LEAN, _TRL_LIVE]),
    ("8B", _with_lora(_8192, _TRL)),
    ("1.5B", [_AUTO, _TRL, _8192, _TRL_KEPT, _LEAN]),
    ("0.5B", [_CHECKPOINTING, _TRL_16]),
    ("1.5B", [_CHECKPOINTING, _TRL_LIVE, _TRL_16]),
    ("8B", _with_lora(_AUTO, _TRL_KEPT, _TRL_16)),
]

# Seconds that making and scoring a model, and the first of its sides, take at most, as far as can be guessed.
_PREPARING = {"0.5B": 60.0, "1.5B": 75.0, "8B": 150.0}
_SIDE = {"0.5B": 25.0, "1.5B": 35.0, "8B": 60.0}


def part_2(report: Report, trl_python: Path) -> None:
    """Measure the claims."""
    report.page = lambda one: f"{side_table(one)}\n\n{claims_table(one)}"
    workloads: dict[str, Workload | None] = {}
    missing = {name: why_not(trl_python, name) for name in ("trl", "peft")}
    for size, sides in ORDER[:2] if report.dry else ORDER:
        if size not in workloads and any(report.wants(f"{size} {name}") for name, _ in sides):
            workloads[size] = ready(report, size, needs=5 if report.dry else _PREPARING[size])
        for name, options in sides:
            kind = "ours" if name.startswith("ours") else "trl"
            needed = ["trl", *(["peft"] if "lora_rank" in options else [])] if kind == "trl" else []
            reason = next((missing[package] for package in needed if missing[package]), "")
            workload = workloads.get(size)
            if not reason and workload is None:
                reason = "its model is not there" if report.wants(f"{size} {name}") else "left out by --only"
            if reason or workload is None:
                report.skip(f"{size} {name}", reason)
                continue
            measure = functools.partial(side, report, workload, kind, name=f"{size} {name}", options=options)
            python = trl_python if kind == "trl" else Path(sys.executable)
            report.add(
                f"{size} {name}",
                lambda left, measure=measure, python=python: measure(seconds=left, python=python),
                needs=5 if report.dry else _SIDE[size],
                like=f"{size} {kind}",
            )


def why_not(python: Path, package: str) -> str:
    """Return why TRL's side cannot use a package, or nothing if it can."""
    finds = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        found = subprocess.run([python, "-c", finds], check=False).returncode == 0
    except OSError as error:
        return f"{python} cannot be started: {error.strerror}"
    return "" if found else f"{python} has no package {package}"


def part_1(report: Report) -> None:
    """Run the tests marked `gpu`; a dry run rehearses them on the CPU."""
    report.page = tests_table
    run_tests(report)


def part_3(report: Report) -> None:
    """Measure why: the output layer, kinds of kernels, single switches, scoring, numerics, a sweep."""
    report.page = why_page
    report.add("output layer", functools.partial(output_layer, report))
    workload = ready(report, "0.5B", needs=5 if report.dry else _PREPARING["0.5B"])
    if workload is None:
        return

    def switch(name: str, options: Result, env: dict[str, str] | None = None, *, profile: bool = False) -> None:
        title = f"0.5B {name}"
        report.add(
            title,
            lambda left: side(
                report, workload, "ours", seconds=left, name=title, options=options, env=env, profile=profile
            ),
            needs=5 if report.dry else _SIDE["0.5B"],
            like="compiled" if "compiled" in name else "ours",
        )

    switch("profiled", {}, profile=True)
    switch("as it is", {})
    switch("cuDNN attention", {}, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"})
    numerics(report, workload)
    for tokens in (64, 128) if report.dry else (4096, 16_384, 65_536):
        switch(f"--max-tokens {tokens}", {"max_tokens": tokens})
    sweep(report, workload)
    scoring(report, workload)
    switch("fixed segments", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
    switch("--logging-steps 50", {"logging_steps": 50})
    switch("compiled layers", {"training": {"torch_compile": True}})


def why_page(report: Report) -> str:
    """Return the tables of part 3."""
    layer = report.results.get("output layer", {}).get("table", "")
    shares = report.results.get("0.5B profiled", {}).get("shares", {})
    kinds = ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items())
    rates = [
        f"{name}: {result['tokens_a_second']:,.0f} tokens/s, {result['tflops']:.1f} TFLOP/s"
        for name, result in report.results.items()
        if "tokens_a_second" in result
    ]
    return "\n\n".join(
        filter(None, [layer, side_table(report), f"profiled: {kinds}", "\n".join(rates), numerics_table(report)])
    )


def output_layer(report: Report, seconds: float) -> Result:
    """Measure the output layer's variants."""
    log = report.work / "head.log"
    tiny = ["--device", "cpu", "--tokens", "40", "--sizes", "16x97", "--tiles", "16x32", "--repeats", "1"]
    run_python(
        [HERE / "head_bench.py", *(tiny if report.dry else ["--repeats", "10"])], seconds=min(seconds, 90), log=log
    )
    lines = log.read_text(encoding="utf-8").splitlines()
    return {**json.loads(lines[-1]), "table": "\n".join(lines[:-1])}


def scoring(report: Report, workload: Workload) -> None:
    """Score the rows with token budgets of several sizes."""
    for tokens in (64, 128) if report.dry else (8192, 32_768, 65_536):
        out = report.work / f"scored-{tokens}"
        measure = functools.partial(score, report, workload, out, options=("--max-tokens", tokens))
        report.add(f"scoring in passes of {tokens}", lambda left, measure=measure: measure(seconds=left), like="score")


# Two ways to compute the same scores: options of kto-precompute.
_WAYS: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "bfloat16 and float32": (("--dtype", "bfloat16"), ("--dtype", "float32")),
    "passes of 2k and of 32k tokens": (("--max-tokens", 2048), ("--max-tokens", 32_768)),
}


def numerics(report: Report, workload: Workload) -> None:
    """Score the rows in two ways, and compare nats a token."""
    for name, ways in _WAYS.items():

        def compare(seconds: float, ways: tuple[tuple[object, ...], ...] = ways, name: str = name) -> Result:
            scores = []
            for number, options in enumerate(ways):
                out = report.work / f"{name.replace(' ', '-')}-{number}"
                score(report, workload, out, seconds=seconds / 2, options=options)
                scores.append(read_scores(out))
            return apart(*scores)

        report.add(f"numerics: {name}", compare, needs=5 if report.dry else 40, like="numerics")


def sweep(report: Report, workload: Workload) -> None:
    """Run three equal trials in one worker: their losses must be the same."""

    def run(seconds: float) -> Result:
        config, out = report.work / "sweep.yaml", report.work / "sweep"
        trials = {
            "search": "grid",
            "space": {"weight_decay": [0.0, 1e-30, 2e-30]},  # three trials that compute the same
            "train": {"eval_fraction": 0.1, "max_steps": 2, "batch_size": workload.batch, "save_steps": 0},
        }
        config.write_text(json.dumps(trials), encoding="utf-8")
        words = command("train", "sweep", "--config", config, "--cache", workload.cache, "--out", out, "--workers", 1)
        run_python(words, seconds=seconds, log=report.work / "sweep.log")
        metrics = sorted(out.rglob("metrics.jsonl"))
        records = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in metrics]
        first = [next(record["loss"] for record in run if "loss" in record) for run in records]  # step 0 has none
        return {"first_losses": first, "apart": max(first) - min(first)}

    report.add("sweep", run, needs=5 if report.dry else 45)


PARTS: dict[int, Callable[[Report], None]] = {1: part_1, 3: part_3}


def main() -> int:
    """Run one part; return 1 if a measurement or a test failed, and 0 if some only did not fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2, 3], required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for part-N.json and part-N.md")
    parser.add_argument("--minutes", type=float, default=9.5, help="the part ends within this time (default: 9.5)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: shows that every step runs")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure only what has such a name, as '0.5B TRL'")
    parser.add_argument("--updates", type=int, default=20, help="timed updates of a side, after 5 others (default: 20)")
    parser.add_argument(
        "--trl-python",
        type=Path,
        default=_TRL_ENVIRONMENT if _TRL_ENVIRONMENT.exists() else Path(sys.executable),
        help="an interpreter that has TRL (default: the one that environments.py makes, or this one)",
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * given.minutes - 15
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the process that is measured, too
    with tempfile.TemporaryDirectory() as temporary:
        path = given.out.resolve() / f"part-{given.part}.json"
        for old in (path, path.with_suffix(".log")):
            old.unlink(missing_ok=True)
        report = Report(path, until, given.dry, Path(temporary), only=given.only, updates=given.updates)
        try:
            if report.add("facts", functools.partial(facts, report), needs=1, always=True) is not None:
                part_2(report, given.trl_python) if given.part == 2 else PARTS[given.part](report)
        finally:
            report.write()
            print(f"\n{report.text()}", flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
