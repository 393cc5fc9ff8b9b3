"""Describe a plan to the user: the format, the labels, the rows that are left out, lengths, and example rows."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from offline_kto.kto_core.errors import printable
from offline_kto.kto_core.feedback.labels import DOWN, GRADED, LEFT, UP, rare_class
from offline_kto.kto_core.feedback.paths import key_path
from offline_kto.kto_core.feedback.quoting import counted, quoted
from offline_kto.kto_core.library_types import Tokenizer
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.context_keys import is_context
from offline_kto.precompute.feedback.rows import Feedback
from offline_kto.precompute.feedback.used_columns import matters_beside
from offline_kto.precompute.judgement_page import judgements_in_words, masses_in_words, warnings_about_judgements
from offline_kto.precompute.plan import Plan, PlanCounts
from offline_kto.precompute.preview import block, folded, visible, width

_WIDTH = 100
_INDENT = 12
# Columns whose names suggest that they change the meaning of a row.
_MATTERS = re.compile(
    r"split|system|score|rating|reward|feedback|thumb|vote|^weight$|image|img|audio|video|subset|partition|contexts?(?![a-z.])|documents|"
    r"passages|knowledge|functions|tool_?calls?|function_?calls?|^files$|quality|history|instruction|(?<![a-z])(?:fold|tools|grade|stars)(?![a-z])|"
    r"^(?:messages|conversations|set|is_test|inputs?|reasoning(?:_content)?|thinking|thoughts?|(?:corrected|edited|improved)_\w+|corrections?)$",
    re.IGNORECASE,
)
# Columns that identify feedback or say when it was given.
_IDENTIFIES = re.compile(r"[_.](?:id|ids|date|at|time|timestamp|fingerprint)$", re.IGNORECASE)
# Lines of each text of an example.
_EXAMPLE_LINES = 4


def describe(
    plan: Plan,
    counts: PlanCounts,
    config: PrecomputeConfig,
    tokenizer: Tokenizer,
    estimates: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Return a description of the plan, lines of at most 100 columns.

    Args:
        estimates: (name, text) of what scoring will take.
    """
    entries = [*_entries(plan, counts, config), *estimates]
    lines = [line for name, text in entries for line in wrapped(name, text)]
    lines += [line for text in warnings(plan, counts) for line in wrapped("warning", text)]
    return [*lines, *_examples(plan, tokenizer)]


def wrapped(name: str, text: str) -> list[str]:
    """Return a text as lines beside its name."""
    lines = folded(text, _WIDTH - _INDENT)
    return [f"{name if number == 0 else '':<{_INDENT}}{line}" for number, line in enumerate(lines)]


def _entries(plan: Plan, counts: PlanCounts, config: PrecomputeConfig) -> Iterator[tuple[str, str]]:
    found = plan.feedback.found
    yield "format", _format(plan.feedback)
    dropped = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in counts.dropped.items()]
    yield (
        "rows",
        f"{counted(found.records, 'record')} -> {counted(counts.read, 'row')}, {counts.kept:,} kept, "
        f"dropped: {', '.join(dropped) or 'none'}",
    )
    if found.left_out.counts:
        where = f" (see {config.left_out})" if config.left_out else " (--left-out FILE lists them)"
        yield "left out", ", ".join(found.left_out.in_words()) + where
    yield (
        "labels",
        f"{counts.desirable:,} desirable, {counts.undesirable:,} undesirable{_values(plan.feedback, counts.kept)}",
    )
    yield from judgements_in_words(plan, counts)
    yield "prompts", f"{counts.prompts:,} distinct; {_kinds(plan.feedback)}"
    if unused := [*plan.feedback.unused_columns(), *plan.feedback.unused_beside()]:
        yield "unused", f"columns {quoted(unused, 300)[1:-1]}"
    yield "tokens", _lengths(plan)
    yield (
        "truncated",
        f"{counted(counts.truncated, 'completion')}, {counted(counts.kl_truncated, 'mismatched completion')} "
        f"(--max-length {config.max_length})",
    )
    yield "pairing", f"{config.pairing}, {counted(config.kl_partners, 'mismatched completion')} for each row"
    yield "to score", f"{counted(counts.sequences, 'sequence')}, {counted(counts.tokens, 'token')}"


def _format(feedback: Feedback) -> str:
    if feedback.mapping is not None:
        return f"{feedback.mapping.name} ({feedback.why})"
    forms = feedback.found.forms
    named = [form if len(forms) == 1 else f"{form} ({count:,})" for form, count in forms.most_common()]
    return ", ".join(named) + (f" ({feedback.why})" if feedback.why else "")


def _values(feedback: Feedback, kept: int) -> str:
    """Return the label values by their meaning: up, down or left out.

    They are counted where they are read, also those of rows that are left out later.
    """
    by_destination: dict[str, list[str]] = defaultdict(list)
    for (value, destination), count in feedback.label_rule.seen.most_common():
        by_destination[destination].append(f"{value} ({count:,})")
    order = [name for name in (UP, DOWN, GRADED, LEFT) if by_destination[name]]
    is_pair = feedback.mapping is not None and feedback.mapping.pair is not None
    shown = {"up": "the first is better", "down": "the second is better"} if is_pair else {}
    parts = [f"{shown.get(name, name)}: {_few(by_destination[name])}" for name in order]
    judged = sum(count for (_, destination), count in feedback.label_rule.seen.items() if destination != LEFT)
    as_read = "values as read: " if judged > kept else ""
    return f" ({as_read}{'; '.join(parts)})" if parts else ""


def _few(words: Sequence[str], most: int = 5) -> str:
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {counted(more, 'more value')}" if more > 0 else "")


def _kinds(feedback: Feedback) -> str:
    found = feedback.found
    rows = [(found.chat, "chat row"), (found.plain, "plain-text row")]
    parts = {
        "converted from text (--chat never keeps text)": found.from_text,
        "with a system message": found.system,
        "already rendered by a chat template, kept as text": found.rendered,
        "with tool results moved to the prompt": found.moved_results,
    }
    shown = [counted(count, name) for count, name in rows if count]
    return ", ".join([*shown, *(f"{count:,} {name}" for name, count in parts.items() if count)])


def _lengths(plan: Plan) -> str:
    rows = plan.rows
    parts = []
    for name, sizes in (("prompts", rows.prompt_lengths), ("completions", rows.full_lengths)):
        half, most, all_but_few = np.percentile(sizes, [50, 90, 99])
        parts.append(f"{name}: median {half:,.0f}, p90 {most:,.0f}, p99 {all_but_few:,.0f}, longest {sizes.max():,}")
    total = int(rows.full_lengths.sum())
    cut = total - int(rows.lengths.sum())
    return "; ".join(parts) + f"; {cut / total:.1%} of completion tokens cut"


def _examples(plan: Plan, tokenizer: Tokenizer) -> list[str]:
    """Return the first rows of each class as the model sees them."""
    lines: list[str] = []
    columns = width(_WIDTH)
    for where, row in plan.examples:
        masses = f" ({masses_in_words(row.judgement.masses)})" if plan.mass_columns else ""
        lines += wrapped("example", f"{'desirable' if row.label else 'undesirable'}{masses}, {printable(where)}")
        lines += block("  prompt      ", visible(tokenizer, row.prompt_ids), columns, _EXAMPLE_LINES)
        lines += block("  completion  ", visible(tokenizer, row.completion_ids), columns, _EXAMPLE_LINES)
    return lines


def warnings(plan: Plan, counts: PlanCounts) -> list[str]:
    """Return warnings for the user, before scoring starts."""
    found = [*plan.notes]
    aside = () if plan.feedback.mapping is None else plan.feedback.mapping.aside
    unused = [name for name in plan.feedback.unused_columns() if name not in aside]
    matters = [name for name in unused if is_context(name) or (_MATTERS.search(name) and not _IDENTIFIES.search(name))]
    matters += [name for name in unused if name not in matters and name in plan.feedback.columns_of_messages()]
    matters = [name for name in matters if not any(note.startswith(f"'{name}' contradicts") for note in plan.notes)]
    matters += [name for name in plan.feedback.unused_beside() if matters_beside(name)]
    if matters:
        system = next((key_path(name) for name in matters if "system" in name.lower()), "COLUMN")
        found.append(
            f"unused columns whose names suggest that they matter: {', '.join(matters[:10])}. Use a column as the prompt, answer "
            "or label with --prompt-field, --completion-field or --label-field, and as the system text or tools with --map FILE "
            f"(`system: {system}`)."
        )
    if plan.rendered_on:
        found.append(
            f"the chat template writes the date: all rows are rendered for {plan.rendered_on[:10]}, also in later runs into "
            "this --out. For a comparable cache in another folder, pass --template-date "
            f"{plan.rendered_on[:10]}."
        )
    if 0 in counts.masses:
        only = "desirable" if counts.desirable else "undesirable"
        found.append(f"every row is {only}: KTO needs both classes. Check the labels.")
    found += warnings_about_judgements(plan)
    if rare := rare_class(counts.desirable, counts.undesirable):
        found.append(rare)
    if counts.repeats.contradictions:
        carry = "carries" if counts.repeats.contradictions == 1 else "carry"
        found.append(
            f"{counted(counts.repeats.contradictions, 'completion')} {carry} both labels; the effects cancel out."
        )
    elif counts.duplicates:
        found.append(f"rows that repeat another row: {counts.duplicates:,}.")
    if plan.pairing.same_prompt:
        found.append(
            f"mismatched completions that answer the row's own prompt (--pairing rotate): {plan.pairing.same_prompt:,}."
        )
    if plan.pairing.same_completion:
        found.append(f"mismatched completions that are identical to the row's own: {plan.pairing.same_completion:,}.")
    fair = plan.pairing.partners.shape[1]
    if plan.pairing.most_served > 2 * fair + 2:
        found.append(
            f"most rows have the same prompt, so one completion is used up to {plan.pairing.most_served:,} times as a "
            "mismatched completion; z0 depends on few completions."
        )
    if counts.truncated > counts.kept // 4:
        found.append(
            f"{counts.truncated / counts.kept:.0%} of the completions are cut. Raise --max-length if memory allows."
        )
    return found
