"""Describe a plan to the user: how the file was read, what its labels became, what is left out, what the model sees."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from offline_kto.kto_core.feedback.labels import rare_class
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.plan import Plan, PlanCounts
from offline_kto.precompute.preview import block, visible, width

_WIDTH = 100
_INDENT = 12
# Columns whose names say that they change what a row means.
_MATTERS = re.compile(r"split|system|score|rating|reward|feedback|thumb|vote|image|img|audio|video", re.IGNORECASE)
# Lines of each text of an example.
_EXAMPLE_LINES = 4


def describe(plan: Plan, counts: PlanCounts, config: PrecomputeConfig, tokenizer: Tokenizer) -> list[str]:
    """Return a description of the plan, lines of at most 100 columns unless a single word is longer."""
    lines = [line for name, text in _entries(plan, counts, config) for line in _wrapped(name, text)]
    lines += [line for text in warnings(plan, counts) for line in _wrapped("warning", text)]
    return [*lines, *_examples(plan, tokenizer)]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{name:<{_INDENT}}",
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _entries(plan: Plan, counts: PlanCounts, config: PrecomputeConfig) -> Iterator[tuple[str, str]]:
    found = plan.feedback.found
    yield "format", _format(plan.feedback)
    dropped = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.dropped.items()]
    yield (
        "rows",
        f"{found.records:,} records -> {counts.read:,} rows, {counts.kept:,} kept, dropped: {', '.join(dropped) or 'none'}",
    )
    if found.left_out.counts:
        where = f" (see {config.left_out})" if config.left_out else " (--left-out FILE lists them)"
        yield "left out", ", ".join(found.left_out.in_words()) + where
    yield "labels", f"{counts.desirable:,} desirable, {counts.undesirable:,} undesirable{_values(plan.feedback)}"
    yield "prompts", f"{counts.prompts:,} distinct; {_kinds(plan.feedback)}"
    if unused := _unused(plan.feedback):
        yield "not read", f"columns {quoted(unused, 300)[1:-1]}"
    yield "tokens", _lengths(plan)
    yield (
        "truncated",
        f"{counts.truncated:,} completions, {counts.kl_truncated:,} mismatched completions (--max-length {config.max_length})",
    )
    partners = "completion" if config.kl_partners == 1 else "completions"
    yield "pairing", f"{config.pairing}, {config.kl_partners} mismatched {partners} for each row"
    yield "to score", f"{counts.sequences:,} sequences, {counts.tokens:,} tokens"


def _format(feedback: Feedback) -> str:
    if feedback.mapping is not None:
        return f"{feedback.mapping.name} ({feedback.why})"
    forms = feedback.found.forms
    named = [form if len(forms) == 1 else f"{form} ({count:,})" for form, count in forms.most_common()]
    return ", ".join(named) + (f" ({feedback.why})" if feedback.why else "")


def _values(feedback: Feedback) -> str:
    """Return what each value of the labels became."""
    by_destination: dict[str, list[str]] = defaultdict(list)
    for (value, destination), count in feedback.label_rule.seen.most_common():
        by_destination[destination].append(f"{value} ({count:,})")
    order = [name for name in ("up", "down", "left out") if by_destination[name]]
    parts = [f"{name}: {_few(by_destination[name])}" for name in order]
    return f" ({'; '.join(parts)})" if parts else ""


def _few(words: Sequence[str], most: int = 5) -> str:
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more:,} more values" if more > 0 else "")


def _kinds(feedback: Feedback) -> str:
    found = feedback.found
    parts = [f"{found.chat:,} rows of chat", f"{found.plain:,} of plain text"]
    if found.from_text:
        parts.append(f"{found.from_text:,} of the chat rows were text (--chat never keeps it)")
    if found.system:
        parts.append(f"{found.system:,} with a system message")
    if found.rendered:
        parts.append(f"{found.rendered:,} rows of text stay text: a chat template has rendered them already")
    if found.moved_results:
        parts.append(f"in {found.moved_results:,} the results of tools became part of the prompt")
    return ", ".join(parts)


def _unused(feedback: Feedback) -> list[str]:
    return [name for name, _ in feedback.found.columns.most_common() if name not in feedback.used_columns]


def _lengths(plan: Plan) -> str:
    sides = {
        "prompts": np.array([len(row.prompt_ids) for row in plan.rows]),
        "completions": np.array([len(row.full_completion_ids) for row in plan.rows]),
    }
    parts = []
    for name, sizes in sides.items():
        half, most, all_but_few = np.percentile(sizes, [50, 90, 99])
        parts.append(
            f"{name} {half:,.0f} in the middle, 90 % up to {most:,.0f}, 99 % up to {all_but_few:,.0f}, longest {sizes.max():,}"
        )
    cut = sum(len(row.full_completion_ids) - len(row.completion_ids) for row in plan.rows)
    total = int(sides["completions"].sum())
    return "; ".join(parts) + f"; {cut / total:.1%} of the completions' tokens are cut"


def _examples(plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Return the first rows of each class as the model will see them."""
    lines: list[str] = []
    columns = width(_WIDTH)
    for where, row in plan.examples:
        lines.append(f"example     {'desirable' if row.label else 'undesirable'}, {where}")
        lines += block("  prompt      ", visible(tokenizer, row.prompt_ids), columns, _EXAMPLE_LINES)
        lines += block("  completion  ", visible(tokenizer, row.completion_ids), columns, _EXAMPLE_LINES)
    return lines


def warnings(plan: Plan, counts: PlanCounts) -> list[str]:
    """Return what the user should know before scoring starts."""
    found = [*plan.notes]
    matters = [name for name in _unused(plan.feedback) if _MATTERS.search(name)]
    if matters:
        found.append(
            f"not read, though the names sound as if they mattered: {', '.join(matters[:10])}. --map or the --...-field options "
            "use a column."
        )
    if plan.rendered_on:
        found.append(
            f"the chat template writes the date: all rows are rendered for {plan.rendered_on[:10]}, and later runs into this "
            "--out too. For a cache elsewhere that is to be compared with it, pass --template-date "
            f"{plan.rendered_on[:10]}."
        )
    if not counts.desirable or not counts.undesirable:
        only = "desirable" if counts.desirable else "undesirable"
        found.append(f"every row is {only}: KTO needs both classes. Check the labels.")
    if rare := rare_class(counts.desirable, counts.undesirable):
        found.append(rare)
    if counts.contradictions:
        found.append(f"{counts.contradictions:,} completions carry both labels; their effects cancel out.")
    elif counts.duplicates:
        found.append(f"{counts.duplicates:,} rows repeat another row.")
    if plan.pairing.same_prompt:
        found.append(f"{plan.pairing.same_prompt:,} mismatched completions answer the same prompt (--pairing rotate).")
    if plan.pairing.same_completion:
        found.append(f"{plan.pairing.same_completion:,} mismatched completions read like the row's own.")
    fair = len(plan.pairing.partners[0])
    if plan.pairing.most_served > 2 * fair + 2:
        found.append(
            f"one prompt holds most rows, so a completion serves up to {plan.pairing.most_served:,} times as a mismatch; "
            "z0 rests on few completions."
        )
    if counts.truncated > counts.kept // 4:
        found.append(
            f"{counts.truncated / counts.kept:.0%} of the completions are cut. Raise --max-length if memory allows."
        )
    return found
