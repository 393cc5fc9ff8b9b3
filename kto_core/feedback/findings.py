"""Count the problems that rendering and tokenization find, with the first row of each kind."""

from collections import Counter
from dataclasses import dataclass, field

# Sentences for the plan. {n} is the count, {s} a plural s, {first} the location of the first row.
_SENTENCES = {
    "continued": "{n:,} prompt{s} end{v} with an unfinished assistant's message; the completion continues it (first: {first}).",
    "reopened": (
        "the chat template adds the header of the assistant's next turn after {n:,} completion{s}; that header is removed "
        "(first: {first})."
    ),
    "reasoning": (
        "the chat template leaves out the reasoning of {n:,} completion{s}: it is neither scored nor trained (first: "
        "{first}). Pass a template that renders it (--chat-template)."
    ),
    "settings": "the chat template reads none of some 'chat_template_kwargs' of {n:,} row{s} (first: {first}).",
    "open": (
        "the chat template writes no special token after {n:,} completion{s}: training on them does not teach the model "
        "to stop (first: {first}). Pass a template that ends turns (--chat-template)."
    ),
    "closed": (
        "{n:,} answer{s} end{v} with the token that ends a turn; it is removed, because the chat template writes it (first: {first})."
    ),
    "other_end": (
        "{n:,} answer{s} end{v} with the mark that ends a turn of another model (first: {first}). It is scored as text; remove it "
        "from the answers."
    ),
    "special": (
        "messages of {n:,} row{s} contain special tokens of the tokenizer (first: {first}): the model reads them as begin or end of a "
        "turn, not as words. Remove them; if a whole prompt has been rendered by the chat template, pass it as text in `prompt`, "
        "without a system text or messages."
    ),
    "unopened": (
        "{n:,} rendered prompt{s} end{v} within the user's turn, without the header of the answer (first: {first}). Add it as the chat "
        "template writes it, or pass the conversation as messages."
    ),
    "two_bos": "{n:,} row{s} begin{v} with two BOS tokens (first: {first}). Check the chat template, or the text.",
    "lost": (
        "the tokenizer loses characters of {n:,} row{s}: it has no token for them (first: {first}). Check that the "
        "tokenizer belongs to the model."
    ),
}


@dataclass
class Findings:
    """Counts of rows that the user should know about, each kind with the location of its first row."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Add to the count of a kind.

        Args:
            kind: a key of the sentences, or another name that only the caller reads.
            where: location of the row, as in errors.
        """
        self.counts[kind] += count
        self.first.setdefault(kind, where)

    def clear(self) -> None:
        self.counts.clear()
        self.first.clear()

    def merge(self, later: "Findings") -> None:
        """Add the counts of rows that come after all others."""
        self.counts.update(later.counts)
        for kind, where in later.first.items():
            self.first.setdefault(kind, where)

    def sentences(self) -> list[str]:
        """Return a sentence for each kind with a count."""
        return [
            text.format(n=n, s="" if n == 1 else "s", v="s" if n == 1 else "", first=self.first[kind])
            for kind, text in _SENTENCES.items()
            if (n := self.counts[kind])
        ]
