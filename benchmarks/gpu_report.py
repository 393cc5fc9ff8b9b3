"""Measure on one GPU what the documentation may claim: is it right (1), what does it cost beside TRL (2), and why (3).

    python benchmarks/gpu_report.py --part 1 --out results
    python benchmarks/gpu_report.py --part 2 --out results
    python benchmarks/gpu_report.py --part 3 --out results
    python benchmarks/gpu_report.py --part 2 --out results --dry     # the same steps with tiny sizes on the CPU

Each part takes less than --minutes (9.5), runs from the source tree without a package index, and needs nothing that
another part left. What does not fit into the time is listed as not measured; each result is written as soon as it is
there. A side is left out with its reason where its package (TRL) cannot be imported.

Part 1 runs the tests marked `gpu`. Part 2 times 20 updates of 32 rows after 5 of warm-up, one process for each side,
on the same rows in the same order, and prints the claims with their verdicts. Part 3 measures the output layer, the
kinds of kernels in an update, single switches, scoring, and how far apart two ways to compute a score are.
Every table names card, versions and the rate of a large matrix product in the same call.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_workload import SIZES, chat_rows, save_model, write_rows
from text_table import text_table

HERE = Path(__file__).resolve().parent
_CLI = "from offline_kto.{module}.cli import {command}; {command}()"
Result = dict[str, Any]


@dataclass
class Report:
    """The results of one part, written to a file after each of them.

    Args:
        path: JSON file.
        until: when the part has to end, by `time.monotonic()`.
        dry: tiny sizes on the CPU.
        work: folder for models, caches and logs.
    """

    path: Path
    until: float
    dry: bool
    work: Path
    results: dict[str, Result] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: bool = False
    trl_python: Path = Path(sys.executable)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def add(self, name: str, measure: Callable[[float], Result], *, needs: float = 20) -> Result | None:
        """Run a measurement; note it as skipped if it fails or if less than `needs` seconds are left."""
        if self.left < needs:
            self.skipped[name] = f"{self.left:.0f} s were left"
            return None
        print(f"{name} ({self.left:.0f} s left)", flush=True)
        try:
            self.results[name] = measure(self.left)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
            self.failed, self.skipped[name] = True, " ".join(str(error).split())[-600:]
            print(f"  not measured: {self.skipped[name]}", flush=True)
        self.write()
        return self.results.get(name)

    def write(self) -> None:
        text = json.dumps(
            {"facts": self.results.get("facts"), "results": self.results, "skipped": self.skipped}, indent=1
        )
        self.path.write_text(text + "\n", encoding="utf-8")

    def seconds(self, name: str) -> float | None:
        return self.value(name, "median_seconds")

    def value(self, name: str, key: str) -> float | None:
        found = self.results.get(name, {}).get(key)
        return None if found is None else float(found)


def run_python(
    words: list[str | Path],
    *,
    seconds: float,
    log: Path,
    env: dict[str, str] | None = None,
    python: Path = Path(sys.executable),
) -> None:
    """Run an interpreter on the source tree. Raises: ValueError: it failed, with the end of its output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    settings = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(env or {})}
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [python, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=settings,
            timeout=max(1.0, seconds),
            check=False,
        )
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: {log.read_text(encoding='utf-8', errors='replace')[-600:]}")


def facts(seconds: float) -> Result:
    """Return card, versions, and the rate of a product of two large matrices in TFLOP/s."""
    program = (
        "import json, torch, transformers, accelerate\n"
        "gpu = torch.cuda.is_available()\n"
        "size, kind = (8192, torch.bfloat16) if gpu else (512, torch.float32)\n"
        "a = torch.randn(size, size, dtype=kind, device='cuda' if gpu else 'cpu')\n"
        "import time\n"
        "def wait(): torch.cuda.synchronize() if gpu else None\n"
        "for _ in range(3): a @ a\n"
        "wait(); start = time.perf_counter()\n"
        "for _ in range(10): a @ a\n"
        "wait(); rate = 20 * size**3 / (time.perf_counter() - start)\n"
        "print(json.dumps({'card': torch.cuda.get_device_name() if gpu else 'CPU',\n"
        " 'memory': torch.cuda.mem_get_info()[1] if gpu else None, 'torch': torch.__version__,\n"
        " 'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version() if gpu else None,\n"
        " 'transformers': transformers.__version__, 'accelerate': accelerate.__version__,\n"
        " 'matmul_tflops': rate / 1e12}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise ValueError(done.stderr[-600:])
    found: Result = json.loads(done.stdout.splitlines()[-1])
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


def make_workload(report: Report, size: str, *, answers: int = 1, batches: int = 25) -> Workload:
    """Write model, rows and cache; seconds of scoring are a result of their own."""
    tiny = report.dry
    folder = report.work / f"{size}-{answers}"
    folder.mkdir(parents=True, exist_ok=True)
    batch, max_length = (4, 64) if tiny else (32, 1024)
    count = batch * (4 if tiny else batches)
    rows = chat_rows(count, seed=0, median_words=12 if tiny else 200, most_words=30 if tiny else 650, answers=answers)
    data = write_rows(folder / "rows.jsonl", rows)
    model = save_model(folder / "model", rows, SIZES["tiny" if tiny else size], device=report.device)
    return Workload(size, model, data, folder / "refs", max_length, batch)


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
    flops = 2 * SIZES["tiny" if report.dry else workload.size].layer_weights * tokens
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
) -> Result:
    """Time updates of one side in a process of its own."""
    out = report.work / f"{name.replace(' ', '-').replace('/', '-')}.json"
    warmup, updates = (1, 2) if report.dry else (5, 20)
    words: list[str | Path] = [HERE / "gpu_side.py", kind, "--model", workload.model, "--data", workload.data]
    words += ["--cache", workload.cache, "--out", out, "--batch-size", str(workload.batch)]
    words += ["--max-length", str(workload.max_length), "--warmup", str(warmup), "--updates", str(updates)]
    words += [
        "--options",
        json.dumps({**({"device": "cpu"} if report.dry and kind == "ours" else {}), **(options or {})}),
    ]
    words += ["--profile"] if profile else []
    python = report.trl_python if kind == "trl" else Path(sys.executable)
    run_python(words, seconds=seconds, log=out.with_suffix(".log"), env=env, python=python)
    found: Result = json.loads(out.read_text(encoding="utf-8"))
    return found


# Sides of part 2 by size, in order of worth: what runs out of time is at the end.
_OURS = {"ours auto": {}, "ours 8192": {"max_tokens": 8192}}
_OURS_CHECKPOINTING = {"ours 8192, checkpointing": {"max_tokens": 8192, "gradient_checkpointing": True}}
_OURS_LEAN = {"ours lean": {"memory": "lean"}}
_TRL = {"TRL cached": {}, "TRL cached, no checkpointing": {"gradient_checkpointing": False}}
_TRL_LIVE = {"TRL live": {"precompute_ref_log_probs": False}}
_TRL_16 = {"TRL cached, bfloat16 weights": {"model_dtype": "bfloat16"}}


def sides_of(size: str) -> list[tuple[str, Result]]:
    """Return names and options of the sides of a model size."""
    if size == "8B":
        named = {**_OURS, **_TRL, **_TRL_16}
        return [(name, {**options, "lora_rank": 16}) for name, options in named.items()]
    ours, trl = [*_OURS.items()], [*_TRL.items()]
    return [
        ours[0],
        trl[0],
        ours[1],
        trl[1],
        *_OURS_CHECKPOINTING.items(),
        *_OURS_LEAN.items(),
        *_TRL_LIVE.items(),
        *_TRL_16.items(),
    ]


def part_2(report: Report) -> None:
    """Measure the claims."""
    finds = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    has_trl = subprocess.run([report.trl_python, "-c", finds], check=False).returncode == 0
    for size in ("0.5B",) if report.dry else ("0.5B", "1.5B", "8B"):
        workload: list[Workload] = []

        def prepare(seconds: float, size: str = size, made: list[Workload] = workload) -> Result:
            made.append(make_workload(report, size))
            return score(report, made[0], made[0].cache, seconds=seconds)

        if report.add(f"{size} scoring", prepare, needs=60 if size == "8B" else 20) is None:
            continue
        for name, options in sides_of(size):
            kind = "ours" if name.startswith("ours") else "trl"
            if kind == "trl" and not has_trl:
                report.skipped[f"{size} {name}"] = "TRL cannot be imported"
                continue
            title = f"{size} {name}"

            measure = functools.partial(side, report, workload[0], kind, name=title, options=options)
            report.add(title, lambda left, measure=measure: measure(seconds=left), needs=20 if report.dry else 30)
    print(f"\n{side_table(report)}\n\n{claims_table(report)}")


def side_table(report: Report) -> str:
    """Return one line for each side: seconds of an update, memory, losses."""
    gib = 2**30
    lines = []
    for name, result in report.results.items():
        if "median_seconds" in result:
            peak, reserved = (result.get(key) for key in ("peak_allocated", "peak_reserved"))
            lines.append(
                [
                    name,
                    f"{result['median_seconds']:.3f}",
                    "-" if peak is None else f"{peak / gib:.1f}",
                    "-" if reserved is None else f"{reserved / gib:.1f}",
                    f"{result['losses'][-1]:.5f}",
                    str(result.get("max_tokens", "-")),
                ]
            )
    return text_table(["side", "s an update", "allocated, GiB", "reserved, GiB", "last loss", "tokens a pass"], lines)


@dataclass(frozen=True)
class Claim:
    """A statement of the documentation, and what would show that it is wrong.

    Args:
        value: of a report; None if it was not measured.
        most: the largest value with which the statement holds.
    """

    text: str
    value: Callable[[Report], float | None]
    most: float

    def verdict(self, report: Report) -> list[str]:
        found = self.value(report)
        words = "not measured" if found is None else "holds" if found <= self.most else "FALSIFIED"
        return [self.text, "-" if found is None else f"{found:.3g}", f"{self.most:g}", words]


def _ratio(size: str, ours: str, trl: str, key: str) -> Callable[[Report], float | None]:
    def value(report: Report) -> float | None:
        top, bottom = report.value(f"{size} {ours}", key), report.value(f"{size} {trl}", key)
        return None if top is None or not bottom else top / bottom

    return value


def _auto_is_safe(report: Report) -> float | None:
    """Return the largest share of the card that a run with --max-tokens auto used; 2 if the allocator had to retry."""
    names = [name for name in report.results if name.endswith("ours auto")]
    total = (report.results.get("facts") or {}).get("memory")
    if not names or not total:
        return None
    retried = any(report.value(name, "retries") for name in names)
    return 2.0 if retried else max((report.value(name, "peak_reserved") or 0.0) / total for name in names)


def _losses_apart(report: Report) -> float | None:
    """Return how far the losses of two token budgets are apart."""
    sides = [report.results.get(f"0.5B {name}", {}).get("losses") for name in ("ours auto", "ours 8192")]
    if not all(sides):
        return None
    return max(abs(a - b) for a, b in zip(*sides, strict=True))  # type: ignore[arg-type]


CLAIMS = [
    *(
        Claim(
            f"{size}: time / TRL's, cached, its default", _ratio(size, "ours auto", "TRL cached", "median_seconds"), 0.5
        )
        for size in ("0.5B", "1.5B")
    ),
    Claim("0.5B: time / TRL's, live", _ratio("0.5B", "ours auto", "TRL live", "median_seconds"), 0.5),
    *(
        Claim(
            f"{size}: memory / TRL's, both without checkpointing",
            _ratio(size, "ours 8192", "TRL cached, no checkpointing", "peak_allocated"),
            0.5,
        )
        for size in ("0.5B", "1.5B")
    ),
    *(
        Claim(f"{size}: memory, lean / TRL's default", _ratio(size, "ours lean", "TRL cached", "peak_allocated"), 0.5)
        for size in ("0.5B", "1.5B")
    ),
    Claim("8B LoRA: memory / TRL's default", _ratio("8B", "ours 8192", "TRL cached", "peak_allocated"), 0.5),
    Claim("--max-tokens auto: largest share of the card, no retries", _auto_is_safe, 0.95),
    Claim("losses with two token budgets, apart", _losses_apart, 3e-3),
]


def claims_table(report: Report) -> str:
    """Return the claims as a Markdown table, with card and versions."""
    known = report.results.get("facts") or {}
    lines = ["| claim | measured | at most | verdict |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(claim.verdict(report)) + " |" for claim in CLAIMS]
    where = ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
    return "\n".join([*lines, "", where])


def part_1(report: Report) -> None:
    """Run the tests marked `gpu`."""

    def tests(seconds: float) -> Result:
        log, junit = report.path.with_name("gpu-tests.log"), report.path.with_name("gpu-tests.xml")
        words: list[str | Path] = [
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-rs",
            f"--junitxml={junit}",
            HERE.parent / "tests",
        ]
        try:
            run_python([*words, *(["--collect-only"] if report.dry else [])], seconds=seconds, log=log)
        except ValueError as error:
            return {"passed": False, "end": str(error)[-600:]}
        return {"passed": True, "end": log.read_text(encoding="utf-8")[-600:]}

    found = report.add("tests", tests)
    if found is not None:
        print(found["end"])


def part_3(report: Report) -> None:
    """Measure why: the output layer, kinds of kernels, single switches, scoring, numerics, a sweep."""
    made: list[Workload] = []

    def prepare(seconds: float) -> Result:
        made.append(make_workload(report, "0.5B"))
        return score(report, made[0], made[0].cache, seconds=seconds)

    def head(seconds: float) -> Result:
        log = report.work / "head.log"
        sizes = (
            "--device cpu --tokens 40 --sizes 16x97 --tiles 16x32 --repeats 1" if report.dry else "--repeats 10"
        ).split()
        run_python([HERE / "head_bench.py", *sizes], seconds=min(seconds, 90), log=log)
        text = log.read_text(encoding="utf-8").splitlines()
        print("\n".join(text[:-1]))
        return dict(json.loads(text[-1]))

    report.add("output layer", head)
    if report.add("0.5B scoring", prepare) is None:
        return
    workload = made[0]

    def switch(name: str, options: Result, env: dict[str, str] | None = None, *, profile: bool = False) -> None:
        report.add(
            f"0.5B {name}",
            lambda left: side(
                report, workload, "ours", seconds=left, name=name, options=options, env=env, profile=profile
            ),
        )

    switch("profiled", {}, profile=True)
    switch("as it is", {})
    switch("cuDNN attention", {}, {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"})
    for tokens in (64, 128) if report.dry else (4096, 16_384, 65_536):
        switch(f"--max-tokens {tokens}", {"max_tokens": tokens})
    switch("--logging-steps 50", {"logging_steps": 50})
    switch("fixed segments", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"})
    switch("compiled layers", {"training": {"torch_compile": True}})
    numerics(report, workload)
    sweep(report, workload)
    print(f"\n{side_table(report)}\n\n{json.dumps(report.results.get('0.5B profiled', {}).get('shares'))}\n")
    print(numerics_table(report))


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

        report.add(f"numerics: {name}", compare)


def read_scores(cache: Path) -> dict[int, tuple[float, int]]:
    """Return (nats, tokens) of each labelled row."""
    from pyarrow import parquet

    rows = [
        row for shard in sorted((cache / "train").glob("*.parquet")) for row in parquet.read_table(shard).to_pylist()
    ]
    return {row["source"]: (row["ref_logps"], len(row["completion_ids"])) for row in rows}


def apart(one: dict[int, tuple[float, int]], other: dict[int, tuple[float, int]]) -> Result:
    """Return mean, signed mean, 95th percentile and largest of the differences, nats a token."""
    signed = [(other[row][0] - nats) / tokens for row, (nats, tokens) in one.items()]
    size = sorted(map(abs, signed))
    return {
        "mean": sum(size) / len(size),
        "signed_mean": sum(signed) / len(signed),
        "p95": size[int(0.95 * (len(size) - 1))],
        "largest": size[-1],
    }


def numerics_table(report: Report) -> str:
    """Return one line for each comparison of scores."""
    keys = ("mean", "signed_mean", "p95", "largest")
    rows = [
        [name.removeprefix("numerics: "), *(f"{result[key]:.1e}" for key in keys)]
        for name, result in report.results.items()
        if name.startswith("numerics: ")
    ]
    return text_table(["nats a token", *keys], rows)


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
        first = [json.loads(path.read_text(encoding="utf-8").splitlines()[0])["loss"] for path in metrics]
        return {"first_losses": first, "apart": max(first) - min(first)}

    report.add("sweep", run)


PARTS = {1: part_1, 2: part_2, 3: part_3}


def main() -> int:
    """Run one part; return 1 if a measurement failed, and 0 if some only did not fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=sorted(PARTS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for part-N.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="the part ends within this time (default: 9.5)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: shows that every step runs")
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable), help="an interpreter that has TRL")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        until = time.monotonic() + 60 * given.minutes - 15
        report = Report(
            given.out / f"part-{given.part}.json", until, given.dry, Path(temporary), trl_python=given.trl_python
        )
        if report.add("facts", facts) is not None:
            print(json.dumps(report.results["facts"]))
        PARTS[given.part](report)
        report.write()
    for name, reason in report.skipped.items():
        print(f"not measured: {name}: {reason}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
