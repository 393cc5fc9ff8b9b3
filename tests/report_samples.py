"""Run and sweep folders as kto-train and kto-sweep leave them, made up: for the tests of the report page."""

import csv
import json
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

COMMAND = "kto-train --cache refs/ --eval-fraction 0.1 --out runs/first"


def run_record(seed=0):
    rng = np.random.default_rng(seed)
    lengths = {
        "prompt": rng.lognormal(4, 0.6, 300).astype(int).tolist(),
        "desirable": rng.lognormal(5, 0.5, 150).astype(int).tolist(),
        "undesirable": rng.lognormal(4.6, 0.7, 150).astype(int).tolist(),
    }
    return {
        "fingerprint": "3f1c" * 8,
        "labels_hash": "99ab" * 8,
        "command": COMMAND,
        "started": "2026-11-21T18:00:00+00:00",
        "versions": {"torch": "2.13.0", "transformers": "5.12.1", "python": "3.11.9"},
        "precision": "float32",
        "device": "cpu",
        "weights": [1.0, 1.33],
        "reference": {"id": "org/tiny-llama", "weights_hash": "77cd" * 8, "dtype": "float32"},
        "data": {
            "files": ["feedback.jsonl"],
            "desirable": 150,
            "undesirable": 150,
            "held_out_desirable": 10,
            "held_out_undesirable": 12,
            "dropped": 0,
            "contradictory": 2,
            "max_length": 1024,
            "truncated": 12,
            "sample": 300,
            "lengths": lengths,
        },
    }


def records(steps=300, seed=0, gain=1.0, end=True):
    """Training records for each step, an evaluation every fifty, and the run's time."""
    draw = random.Random(seed)
    found = []
    for step in range(1, steps + 1):
        far = gain * (1 - math.exp(-step / 120))
        chosen, rejected = 0.5 * far + draw.gauss(0, 0.12), -0.4 * far + draw.gauss(0, 0.12)
        raw = 0.6 * far - 0.15 + draw.gauss(0, 0.1)
        found.append(
            {
                "step": step,
                "loss": 0.5 - 0.12 * far + draw.gauss(0, 0.02),
                "grad_norm": 1.4 * math.exp(-step / 400) + abs(draw.gauss(0, 0.2)),
                "learning_rate": 1e-6 * min(step / 30, 1 - step / (steps + 50)),
                "epoch": step / 300,
                "kl": max(raw, 0.0),
                "kl_raw": raw,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "logps/chosen": -210 + 5 * far + draw.gauss(0, 6),
                "logps/rejected": -180 - 6 * far + draw.gauss(0, 6),
                "accuracy": min(1.0, max(0.0, 0.5 + 0.2 * far + draw.gauss(0, 0.06))),
                "padding": 0.03,
                "tokens_per_second": 2400 + draw.gauss(0, 90),
                "peak_memory_mb": 812.0,
            }
        )
        if step % 50 == 0:
            held = {
                "loss": 0.505 - 0.1 * far,
                "accuracy": 0.5 + 0.17 * far,
                "kl": max(0.5 * far - 0.1, 0),
                "kl_raw": 0.5 * far - 0.1,
            }
            held |= {"rewards/chosen": 0.42 * far, "rewards/rejected": -0.33 * far, "rewards/margins": 0.75 * far}
            found.append({"step": step, **{f"eval/{name}": value for name, value in held.items()}})
    return [*found, {"step": steps, "train_runtime": 412.7}] if end else found


def write_records(folder, found):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


def write_rewards(folder, seed=0, rows=300):
    """Write rewards, and return the held-out log-ratios by class."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % 2 == 0
    logratio = np.where(label, rng.normal(5, 9, rows), rng.normal(-4, 12, rows)).astype(np.float32)
    split = np.where(rng.random(rows) < 0.9, "train", "held_out")
    columns = {"split": split, "row_id": [str(i) for i in range(rows)], "label": label, "logratio": logratio}
    pq.write_table(pa.table(columns), folder / "rewards.parquet")
    return {y: logratio[(split == "held_out") & (label == y)].astype(np.float64) for y in (True, False)}


def write_evaluation(folder, shift=0.0):
    def held(value, by):
        return {"value": value + shift, "low": value + shift - by, "high": value + shift + by}

    metrics = {"loss": held(0.412, 0.034), "accuracy": held(0.71, 0.07), "rewards/chosen": held(0.38, 0.11)}
    metrics |= {"rewards/rejected": held(-0.29, 0.1), "rewards/margins": held(0.67, 0.16), "kl": held(0.37, 0.12)}
    content = {"rows": 120, "prompts": 60, "step": 300, "loss": "kto", "resamples": 1000, "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(content))


def write_verdict(folder, change=0.67, by=0.16, steps=300):
    """Step 0, paired intervals of the change since then at each evaluation, and the verdict that follows."""
    found = [{"step": 0, "eval/loss": 0.5, "eval/accuracy": 0.5, "eval/rewards/margins": 0.0}]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "eval/loss" in record:
            part = change * record["step"] / steps
            record |= {"eval/rewards/margins": part, "eval/change/margin": part}
            record |= {"eval/change/margin_low": part - by, "eval/change/margin_high": part + by}
        found.append(record)
    write_records(folder, found)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["metrics"]["rewards/margins"] = {"value": change, "low": change - 0.9 * by, "high": change + 0.9 * by}
    same = {"loss": 0.5, "accuracy": 0.5, "rewards/margins": 0.0}
    evaluation["before"] = {name: {"value": value, "low": value, "high": value} for name, value in same.items()}
    evaluation["change"] = {"rewards/margins": {"value": change, "low": change - by, "high": change + by}}
    outcome = "better" if change > by else "worse" if change < -by else "no difference"
    reason = f"the held-out margin changed by {change:+.4f} [{change - by:+.4f}, {change + by:+.4f}]"
    evaluation["verdict"] = {"outcome": outcome, "by": "rewards/margins", "reason": reason, "next": "a lower rate"}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


SUSPECT_COLUMNS = [
    "kind",
    "place",
    "label",
    "reward",
    "change",
    "logratio",
    "tokens",
    "row_id",
    "prompt",
    "completion",
    "others",
    "split",
]


def write_samples(folder, texts, steps=(0, 150, 300)):
    """Samples of some prompts (texts by prompt) at some steps; what was cut has not ended."""
    lines = [
        {
            "step": step,
            "prompt_id": prompt,
            "prompt": prompt,
            "completion": f"{text} {step}",
            "ended": step > 0,
            "tokens": 37,
        }
        for step in steps
        for prompt, text in texts.items()
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_suspects(folder, rows):
    """Suspect rows with some columns each, the others of a training row of one token."""
    with (folder / "suspects.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.DictWriter(file, SUSPECT_COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({"label": "desirable", "tokens": 1, "split": "train", **row} for row in rows)


CONFIG = {
    "cache": "refs/",
    "loss": "kto",
    "beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": "auto",
    "learning_rate": 1e-6,
    "epochs": 1.0,
    "batch_size": 32,
    "eval_fraction": 0.1,
}


def write_run(folder, seed=0, gain=1.0, steps=300):
    """A finished run. Returns its folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "learning_rate": 1e-6 * gain}))
    (folder / "run.json").write_text(json.dumps(run_record(seed)))
    write_records(folder, records(steps, seed, gain))
    write_evaluation(folder, 0.03 * (gain - 1))
    write_rewards(folder, seed)
    return folder


def write_sweep(folder, trials=50, seed=0):
    """A finished sweep of random trials, three of them without a value. Returns its folder."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    space = {
        "beta": {"values": [0.03, 0.1, 0.3]},
        "learning_rate": {"low": 1e-7, "high": 5e-6, "log": True},
        "loss": {"values": ["kto", "apo_zero", "bco"]},
        "lora_rank": {"values": [0, 8, 32]},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"search": "tpe", "trials": trials, "space": space}))
    found = []
    for index in range(trials):
        params = {
            "beta": draw.choice([0.03, 0.1, 0.3]),
            "learning_rate": 10 ** draw.uniform(-7, -5.3),
            "loss": draw.choice(["kto", "apo_zero", "bco"]),
            "lora_rank": draw.choice([0, 8, 32]),
        }
        gain = (
            1.3 - 0.5 * abs(math.log10(params["learning_rate"]) + 5.9) - abs(params["beta"] - 0.1) + draw.gauss(0, 0.05)
        )
        state = {5: "failed", 17: "pruned", 29: "failed"}.get(index, "complete")
        trial = folder / "trials" / f"{index:04d}"
        trial.mkdir(parents=True)
        logged = records(300 if state == "complete" else 120, index, gain, end=state == "complete")
        write_records(trial, logged)
        (trial / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **params}))
        if state == "complete":
            write_rewards(trial, index)
        last = next(record for record in reversed(logged) if "eval/loss" in record)
        complete = state == "complete"
        found.append(
            {
                "number": index,
                "state": state,
                "params": params,
                "value": last["eval/loss"] if complete else None,
                "metrics": {k: v for k, v in last.items() if k != "step"} if complete else {},
                "seconds": 30 + draw.random() * 20 if complete else None,
                "reason": "TrainingError: the loss became nan at step 121" if state == "failed" else None,
                "host": "anna" if index % 3 else "berta",
            }
        )
    complete = [trial for trial in found if trial["value"] is not None]
    content = {
        **run_record(seed),
        "command": f"kto-sweep --config {folder.name}.yaml --out sweeps/{folder.name}",
        "metric": "eval/loss",
        "direction": "minimize",
        "seconds": 1812.3,
        "space": space,
        "importance": {"learning_rate": 0.61, "beta": 0.27, "loss": 0.08, "lora_rank": 0.04},
        "best": min(complete, key=lambda trial: trial["value"])["number"],
        "trials": found,
    }
    (folder / "sweep.json").write_text(json.dumps(content))
    (folder / "best.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder
