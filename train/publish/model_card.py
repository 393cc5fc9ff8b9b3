"""Write the model card of a run."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from offline_kto.kto_core.cache.manifest import Manifest
from offline_kto.kto_core.durable_files import write_text
from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.options import as_plain, flag
from offline_kto.kto_core.redaction import hidden, is_secret
from offline_kto.train.config import TrainConfig
from offline_kto.train.diagnostics.settings import in_digits
from offline_kto.train.loss_traits import LOSS_TRAITS
from offline_kto.train.model.policy import PolicyFiles
from offline_kto.train.publish.base_model import BaseModel, is_repository_name
from offline_kto.train.publish.citations import citations_of, paper_of
from offline_kto.train.publish.local_paths import LocalPaths, last_name
from offline_kto.train.publish.usage_snippet import PLACEHOLDER, Usage
from offline_kto.train.run_records import EvaluationRecord, MetricInterval, RunData, RunRecord

_SHOWN = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "accuracy")
# Options that choose no hyperparameter.
_NO_HYPERPARAMETERS = ("resume", "dry_run", "training", "push_to_hub")


@dataclass(frozen=True)
class CardContent:
    """The content of a model card.

    Attributes:
        title: name of the run.
        record: content of run.json.
        history: the Trainer's log.
        found: content of evaluation.json; None without held-out rows.
        repository: the repository on the hub that the model is uploaded to, or None.
    """

    title: str
    config: TrainConfig
    manifest: Manifest
    files: PolicyFiles
    record: RunRecord
    history: list[dict[str, object]]
    found: EvaluationRecord | None = None
    repository: str | None = None


def write_card(path: Path, content: CardContent) -> None:
    """Write the card: verdict, usage, data, hyperparameters, metrics, origin, licence and citation. No local path is in it."""
    base = BaseModel.of(content.files)
    paths = LocalPaths.of(content.config, path.parent, content.files, content.manifest.reference)
    is_adapter = (path.parent / "adapter_config.json").exists()
    lines = [
        "---",
        _front_matter(content, base, is_adapter=is_adapter),
        "---",
        "",
        f"# {_text(content.title)}",
        "",
        _origin(content, base),
        "",
        *_verdict(content.found, paths),
        "## Use",
        "",
        *_block("\n".join(_usage(content, base, is_adapter=is_adapter).lines()), "python"),
        "",
        "## Data",
        "",
        *_data(content),
        "",
        "## Training",
        "",
        *_hyperparameters(content),
        "",
        "The command that trained it, with the last name of each path:",
        "",
        *_block(printable(command_of(content.config, paths))),
        "",
        *_metrics(content),
        "## Made with",
        "",
        *_made_with(content),
        "",
        "## License",
        "",
        _license(base),
        "",
        "## Citation",
        "",
        *_block("\n\n".join(citations_of(content.config.loss)), "bibtex"),
    ]
    write_text(path, "\n".join(lines) + "\n")


def _front_matter(content: CardContent, base: BaseModel, *, is_adapter: bool) -> str:
    # The name of a file has no folder, so one with a namespace is a data set of the hub.
    names = [str(file.get("name")) for file in content.manifest.data.get("files") or []]
    known, datasets = base.license, [name for name in names if "/" in name and is_repository_name(name)]
    front = ModelCardData(
        base_model=base.name if base.on_hub else None,
        license=known.license if known else None,
        license_name=known.license_name if known else None,
        license_link=known.license_link if known else None,
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["kto", "alignment", *([content.config.loss] if content.config.loss != "kto" else []), "offline-kto"],
    )
    return front.to_yaml()


def _origin(content: CardContent, base: BaseModel) -> str:
    reference, loss = content.manifest.reference, content.config.loss
    local = reference.get("path") is not None
    scored_by = last_name(reference.get("id")) if local else reference.get("id")
    adapter = reference.get("adapter")
    if adapter and reference.get("adapter_path") is not None:
        adapter = last_name(adapter)
    how = "Kahneman-Tversky Optimization" if loss == "kto" else f"the loss {loss}"
    return (
        f"Aligned on feedback with {how} ({paper_of(loss)}) from {_code(base.name)}, against reference scores of "
        f"{_code(scored_by)}" + (f" with adapter {_code(adapter)}." if adapter else ".")
    )


def _verdict(found: EvaluationRecord | None, paths: LocalPaths) -> list[str]:
    verdict = found["verdict"] if found is not None else None
    if verdict is None:
        return ["Whether it is better than before training was not measured.", ""]
    than = "from" if verdict["outcome"] == "no difference" else "than"
    outcome = f"{verdict['outcome'].capitalize()} {than} before training"
    return [f"**{outcome}**: {_text(paths.shorten(verdict['reason']))}.", ""]


def _usage(content: CardContent, base: BaseModel, *, is_adapter: bool) -> Usage:
    adapter_of = (base.name if base.on_hub else f"path/to/{base.name}") if is_adapter else None
    return Usage(
        name=content.repository or PLACEHOLDER,
        adapter_of=adapter_of,
        chat=bool(content.manifest.tokenization.get("chat")),
        own_code=content.config.trust_remote_code,
    )


def _data(content: CardContent) -> list[str]:
    data, manifest = content.record.get("data") or RunData(), content.manifest
    counts = [
        ("desirable", data.get("desirable", 0), data.get("held_out_desirable", 0)),
        ("undesirable", data.get("undesirable", 0), data.get("held_out_undesirable", 0)),
    ]
    files = manifest.data.get("files") or []
    lines = [
        "| rows | training | held out |",
        "| --- | --- | --- |",
        *(f"| {kind} | {rows:,} | {held_out:,} |" for kind, rows, held_out in counts),
        "",
        "- feedback: " + (", ".join(_code(file.get("name")) for file in files) or "not recorded"),
        "- left out: " + (_text("; ".join(_left_out(data, manifest))) or "nothing"),
    ]
    desirable, undesirable = data.get("desirable_mass"), data.get("undesirable_mass")
    if desirable is not None and undesirable is not None:
        masses = f"mass {in_digits(desirable)} desirable, {in_digits(undesirable)} undesirable"
        lines.append(f"- judgements: {masses} ({_text(', '.join(_judgements(manifest)))})")
    return lines


def _left_out(data: RunData, manifest: Manifest) -> list[str]:
    """Return how many rows were left out, by reason, when they were scored and by this run."""
    scoring = [(count, reason.replace("_", " ")) for reason, count in (manifest.data.get("dropped") or {}).items()]
    shortened = data.get("shortened")
    run = [
        (shortened["dropped"] if shortened else 0, "prompt too long for the run's limit"),
        (data.get("unpaired", 0), "not in a pair, or both rows are equal"),
        (data.get("unjudged", 0), "not judged by a chosen objective"),
    ]
    return [f"{count:,} {reason}" for count, reason in [*scoring, *run] if count]


def _judgements(manifest: Manifest) -> list[str]:
    """Return the kinds of judgements that became masses."""
    found = manifest.judgements
    kinds = [
        f"votes by {found['votes']}" if "votes" in found else "",
        "graded ratings" if found.get("rating_scale") else "",
        "row weights" if found.get("weights") else "",
        f"objectives {', '.join(manifest.objectives)}" if manifest.objectives else "",
    ]
    return [kind for kind in kinds if kind]


def _hyperparameters(content: CardContent) -> list[str]:
    config, weights = content.config, content.record.get("weights") or [1.0, 1.0]
    updates = (content.record.get("final") or {}).get("updates")
    rows: list[tuple[str, object]] = [
        ("loss", config.loss),
        ("beta", f"{config.beta:g}"),
        *((name.replace("_", " "), f"{getattr(config, name):g}") for name in LOSS_TRAITS[config.loss].options),
        ("class weights", f"{weights[0]:.4g} desirable, {weights[1]:.4g} undesirable"),
        ("learning rate", f"{config.peak_rate:g}, {config.scheduler}"),
        ("rows in an update", config.batch_size),
        ("epochs", f"{config.epochs:g}" if config.max_steps is None else None),
        ("updates", f"{updates:,}" if updates is not None else None),
        ("objective", config.objective),
        ("SFT weight", f"{config.sft_weight:g}" if config.sft_weight else None),
        ("LoRA rank", config.lora_rank or None),
        ("LoRA alpha", f"{config.lora_alpha or 2 * config.lora_rank:g}" if config.lora_rank else None),
        ("LoRA targets", config.lora_targets if config.lora_rank else None),
        ("precision", content.record.get("precision")),
        ("seed", config.seed),
        *(
            (f"training: {name}", value)
            for name, value in config.training.items()
            if isinstance(value, bool | int | float) and not is_secret(name, value)
        ),
    ]
    return ["| option | value |", "| --- | --- |"] + [
        f"| {_cell_text(name)} | {_cell_text(value)} |" for name, value in rows if value is not None
    ]


def _metrics(content: CardContent) -> list[str]:
    last: dict[str, object] = next((log for log in reversed(content.history) if "loss" in log), {})
    held = content.found["metrics"] if content.found is not None else {}
    before = content.found["before"] if content.found is not None else {}
    if not last:
        return []
    lines = [
        "## Metrics",
        "",
        "| | last update |" + (" held out | before training |" if held else ""),
        "| --- | --- |" + (" --- | --- |" if held else ""),
    ]
    for name in _SHOWN:
        if name in last:
            cells = _cell(held.get(name)) + _cell(before.get(name)) if held else ""
            lines.append(f"| {name} | {last[name]:.4f} |{cells}")
    return [*lines, ""]


def _made_with(content: CardContent) -> list[str]:
    manifest, versions = content.manifest, content.record.get("versions") or {}
    return [
        f"- reference cache: fingerprint {_code(manifest.fingerprint)}, labels {_code(manifest.data.get('labels_hash'))}",
        "- " + ", ".join(f"{name} {_text(version)}" for name, version in versions.items()),
    ]


def _license(base: BaseModel) -> str:
    if base.license is None:
        return f"License: see the base model, {_code(base.name)}."
    name = base.license.license_name or base.license.license
    return f"That of the base model {_code(base.name)}: {_code(name)}."


def _cell(metric: MetricInterval | None) -> str:
    if metric is None:
        return " |"
    between = f" [{metric['low']:.4f}, {metric['high']:.4f}]" if "low" in metric and "high" in metric else ""
    return f" {metric['value']:.4f}{_text(between)} |"


# Characters that begin markup in Markdown and in embedded HTML.
_MARKUP = re.compile(r"[\\`*\[\]<>&]|(?<!\w)_|_(?!\w)")


def _text(text: object) -> str:
    """Escape text so that Markdown displays it verbatim."""
    return _MARKUP.sub(r"\\\g<0>", printable(str(text), 300))


def _cell_text(text: object) -> str:
    """Escape text for a cell of a table."""
    return _text(text).replace("|", "\\|")


def _code(text: object) -> str:
    """Format text as inline Markdown code, with a fence longer than any fence in it."""
    text = printable(str(text), 500)
    fence = "`" * (_longest_fence(text) + 1)
    blank = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def _block(text: str, language: str = "") -> list[str]:
    """Format lines as a Markdown code block."""
    fence = "`" * max(3, _longest_fence(text) + 1)
    return [fence + language, *map(printable, text.split("\n")), fence]


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def command_of(config: TrainConfig, paths: LocalPaths | None = None) -> str:
    """Return the command line that repeats the run.

    Args:
        paths: paths to shorten, for others to read.
    """
    default = as_plain(TrainConfig())
    words = ["kto-train"]
    for name, value in as_plain(config).items():
        if value == default[name] or name in _NO_HYPERPARAMETERS:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + name.replace("_", "-"))
        else:
            words += [flag(name), hidden(str(value) if paths is None else paths.shorten(str(value)))]
    return shlex.join(words)
