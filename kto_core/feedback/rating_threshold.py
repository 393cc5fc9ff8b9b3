"""Find the value of `--rating-threshold`."""

import statistics
from collections.abc import Iterable, Mapping

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.columns import FeedbackFields
from offline_kto.kto_core.feedback.labels import has_no_value, number_in
from offline_kto.kto_core.feedback.paths import Path
from offline_kto.kto_core.feedback.preference_pairs import is_pair
from offline_kto.kto_core.feedback.quoting import quoted


def resolve_threshold(
    text: str, records: Iterable[tuple[str, Mapping[str, object]]], label: Path | None = None
) -> float:
    """Return the value of --rating-threshold: the number itself, or for "median" the median of all ratings.

    A rating at the threshold is desirable. `records` are (where, record) and are read for "median" only;
    preference pairs and records without a rating are left out.

    Raises:
        ConfigError: neither a finite number nor "median", or no record has a rating.
        FeedbackError: a rating that is not a number.
    """
    if text.strip().lower() != "median":
        number = number_in(text)
        if number is None:
            raise ConfigError(f'--rating-threshold must be a number or "median", got {quoted(text)}.')
        return number
    path = label or Path("rating", "--rating-threshold")
    ratings = [
        _rating(value, where, path)
        for where, record in records
        if not has_no_value(value := path.find(record, where)) and not is_pair(record, FeedbackFields())
    ]
    if len(ratings) == 0:
        raise ConfigError(
            f"--rating-threshold median: no record has a '{path.text}'. Name its column with --label-field."
        )
    return float(statistics.median(ratings))


def _rating(value: object, where: str, path: Path) -> float:
    number = number_in(value)
    if number is None:
        raise FeedbackError(
            f"{where}: '{path.text}' must be a number, since --rating-threshold is set, got {quoted(value)}."
            " Name the column that holds the rating with --label-field."
        )
    return number
