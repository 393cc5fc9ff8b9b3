"""Measure how far several raters agree: the share of unanimous rows, and Krippendorff's alpha."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from offline_kto.kto_core.feedback.judging import Ballots
from offline_kto.kto_core.feedback.quoting import counted

# Krippendorff, Content Analysis (4th edition, 2018), chapter 12: conclusions from data below 0.8 are tentative at best, and
# data below 0.667 are discarded.
RELIABLE, TENTATIVE = 0.8, 0.667
# Votes that alpha is computed from, votes of one row, and different values: more take long and change it little.
MOST_VOTES = 200_000
_MOST_OF_A_ROW, _MOST_VALUES = 1_000, 100


@dataclass
class Agreement:
    """The votes on some rows.

    Attributes:
        rows: number of rows with votes.
        several: number of those with at least two votes.
        unanimous: number of those whose votes are all the same.
        tied: number of rows with as many votes for as against.
        fewest, most: votes on a row.
        most_votes: limit on the votes that alpha is computed from.
    """

    rows: int = 0
    several: int = 0
    unanimous: int = 0
    tied: int = 0
    fewest: int = 0
    most: int = 0
    most_votes: int = MOST_VOTES
    _sample: list[Ballots] = field(default_factory=list)
    _votes: int = 0

    def add(self, ballots: Ballots) -> None:
        """Add the votes on a row."""
        votes = sum(count for _, count in ballots)
        self.rows += 1
        self.fewest, self.most = min(self.fewest or votes, votes), max(self.most, votes)
        if votes < 2:
            return
        self.several += 1
        self.unanimous += len(ballots) == 1
        self.tied += 2 * sum(share * count for share, count in ballots) == votes
        self._add_to_sample(ballots, votes)

    def _add_to_sample(self, ballots: Ballots, votes: int) -> None:
        if votes <= _MOST_OF_A_ROW and self._votes + votes <= self.most_votes:
            self._sample.append(ballots)
            self._votes += votes

    def merge(self, later: "Agreement") -> None:
        """Add the votes on rows that come after all others, whose sample had no limit."""
        if later.rows:
            self.fewest = min(self.fewest or later.fewest, later.fewest)
        self.most = max(self.most, later.most)
        self.rows += later.rows
        self.several += later.several
        self.unanimous += later.unanimous
        self.tied += later.tied
        for ballots in later._sample:
            self._add_to_sample(ballots, sum(count for _, count in ballots))

    @property
    def sampled(self) -> int:
        """Number of rows that alpha is computed from."""
        return len(self._sample)

    def alpha(self) -> float | None:
        """Return Krippendorff's alpha; None if there are no two rows with several votes, or all votes are the same.

        Ratings are on an interval scale; for labels, which are 0 and 1, this equals the nominal alpha.
        """
        values = {share for ballots in self._sample for share, _ in ballots}
        if len(self._sample) < 2 or not 2 <= len(values) <= _MOST_VALUES:
            return None
        from nltk.metrics.agreement import AnnotationTask
        from nltk.metrics.distance import interval_distance

        return float(AnnotationTask(self._triples(), distance=interval_distance).alpha())

    def _triples(self) -> Iterator[tuple[int, int, float]]:
        """Yield (rater, row, value). Raters are numbered in each row: alpha does not depend on who they are."""
        for row, ballots in enumerate(self._sample):
            values = [share for share, count in ballots for _ in range(count)]
            yield from ((rater, row, value) for rater, value in enumerate(values))


def add_votes(found: dict[str, Agreement], ballots: Mapping[str, Ballots], *, most_votes: int = MOST_VOTES) -> None:
    """Add the votes of a row, by the name of their objective."""
    for name, votes in ballots.items():
        found.setdefault(name, Agreement(most_votes=most_votes)).add(votes)


def agreement_in_words(agreement: Agreement) -> str:
    """Return the measures of some votes, as "2 to 5 votes on a row; 70.0% of 40 rows unanimous, alpha 0.61"."""
    votes = str(agreement.most) if agreement.fewest == agreement.most else f"{agreement.fewest} to {agreement.most:,}"
    text = f"{counted(agreement.rows, 'row')} with {votes} vote{'' if votes == '1' else 's'}"
    if not agreement.several:
        return text
    text += f", {agreement.unanimous / agreement.several:.1%} unanimous"
    if agreement.several < agreement.rows:
        text += f" of {agreement.several:,} with several"
    alpha = agreement.alpha()
    if alpha is None:
        return text
    some = f" of {counted(agreement.sampled, 'row')}" if agreement.sampled < agreement.several else ""
    return f"{text}, Krippendorff's alpha {alpha:.2f}{some}"
