"""Write the model card of a run."""

import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCardData

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.options import as_plain, flag
from offline_kto.kto_core.redaction import hidden
from offline_kto.train.config import TrainConfig
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.run_records import EvaluationRecord, MetricInterval

CARD = "README.md"

_SHOWN = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "accuracy")


def write_card(
    path: Path,
    title: str,
    config: TrainConfig,
    manifest: Manifest,
    files: PolicyFiles,
    weights: tuple[float, float],
    history: list[dict[str, object]],
    *,
    found: EvaluationRecord | None = None,
) -> None:
    """Write the card: verdict, base model, cache fingerprint, command and last metrics.

    Args:
        found: content of evaluation.json; None without held-out rows.
    """
    front = ModelCardData(
        base_model=printable(files.name),
        library_name="peft" if (path.parent / "adapter_config.json").exists() else "transformers",
        pipeline_tag="text-generation",
        tags=["kto", "alignment"],
    )
    data = manifest.data
    last: dict[str, object] = next((log for log in reversed(history) if "loss" in log), {})
    held = found["metrics"] if found is not None else {}
    before = found["before"] if found is not None else {}
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {_text(title)}",
        "",
        f"Aligned with Kahneman-Tversky Optimization (arXiv 2402.01306) from {_code(files.name)}, against reference scores of "
        f"{_code(manifest.reference.get('id'))}" + (f" with adapter {_code(files.adapter)}." if files.adapter else "."),
        "",
        *_verdict(found),
        f"- reference cache: fingerprint {_code(manifest.fingerprint)}, labels {_code(manifest.data.get('labels_hash'))}",
        f"- feedback: {data.get('desirable'):,} desirable and {data.get('undesirable'):,} undesirable rows from "
        + ", ".join(_code(file.get("name")) for file in data.get("files") or []),
        f"- class weights: {weights[0]:.4g} desirable, {weights[1]:.4g} undesirable",
        "",
        *_block(command_of(config)),
        "",
        "| | last update |" + (" held out | before training |" if held else ""),
        "| --- | --- |" + (" --- | --- |" if held else ""),
    ]
    for name in _SHOWN:
        if name in last:
            cells = _cell(held.get(name)) + _cell(before.get(name)) if held else ""
            lines.append(f"| {name} | {last[name]:.4f} |{cells}")
    write_text(path, "\n".join(lines) + "\n")


def _verdict(found: EvaluationRecord | None) -> list[str]:
    verdict = found["verdict"] if found is not None else None
    if verdict is None:
        return ["Whether it is better than before training was not measured.", ""]
    than = "from" if verdict["outcome"] == "no difference" else "than"
    outcome = f"{verdict['outcome'].capitalize()} {than} before training"
    return [f"**{outcome}**: {_text(verdict['reason'])}.", ""]


def _cell(metric: MetricInterval | None) -> str:
    return " |" if metric is None else f" {metric['value']:.4f} |"


# Characters that begin markup in Markdown and in embedded HTML.
_MARKUP = re.compile(r"[\\`*\[\]<>&]|(?<!\w)_|_(?!\w)")


def _text(text: object) -> str:
    """Escape text so that Markdown displays it verbatim."""
    return _MARKUP.sub(r"\\\g<0>", printable(str(text), 300))


def _code(text: object) -> str:
    """Format text as inline Markdown code, with a fence longer than any fence in it."""
    text = printable(str(text), 500)
    fence = "`" * (_longest_fence(text) + 1)
    blank = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def _block(text: str) -> list[str]:
    """Format a line as a Markdown code block."""
    fence = "`" * max(3, _longest_fence(text) + 1)
    return [fence, printable(text), fence]


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def command_of(config: TrainConfig) -> str:
    """Return the command line that repeats the run."""
    default = as_plain(TrainConfig())
    words = ["kto-train"]
    for name, value in as_plain(config).items():
        if value == default[name] or name in ("resume", "dry_run", "training"):
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + name.replace("_", "-"))
        else:
            words += [flag(name), hidden(str(value))]
    return shlex.join(words)
