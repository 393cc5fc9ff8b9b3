"""Read scores, and the answers of raters, in exports of applications: functions that mappings use beside JMESPath's."""

from typing import Any, Final

from offline_kto.kto_core.feedback.labels import number_in
from offline_kto.kto_core.feedback.left_out import CORRECTED, OTHER_SCORES, LeftOut
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.stored_values import entered, opened

# More votes than one answer gets; they are listed one by one.
_MOST_COUNTED: Final = 1_000_000


def scored(value: object) -> dict[str, object]:
    """Return the columns that are scores of Opik's, without their reasons and without "-", which is no score."""
    found = value if isinstance(value, dict) else {}
    reasons = {f"{name}_reason" for name in found}
    return {name: item for name, item in found.items() if item != "-" and name not in reasons}


def own_scores(record: object) -> list[dict[str, object]]:
    """Return the scores in a record of Langfuse's that judge it, by name and value.

    Raises:
        LeftOut: it has only scores of something else, or only a corrected answer.
    """
    scores, others = _scores(record), other_scores(record)
    if others and len(others) == len(scores):
        key, name = _judged(others[0])
        raise LeftOut(
            OTHER_SCORES, f"{key} {quoted(name)}; export the observations with their scores, or score the traces"
        )
    own = [one for one in scores if one not in others]
    rated = [one for one in own if "CORRECTION" not in (one.get("dataType"), one.get("data_type"))]
    if own and not rated:
        raise LeftOut(CORRECTED, f"the correction {quoted(own[0]['name'])} is a text, and no label")
    return [
        {"name": one["name"], "value": one.get("stringValue") or one.get("string_value") or one.get("value")}
        for one in rated
    ]


def other_scores(record: object) -> list[dict[str, object]]:
    """Return the scores in a record of Langfuse's that judge one of its observations, or its whole session."""
    name = record.get("id") if isinstance(record, dict) else None
    return [one for one in _scores(record) if _judged(one)[1] not in (None, name)]


def _scores(record: object) -> list[dict[str, object]]:
    scores = opened(record.get("scores")) if isinstance(record, dict) else None
    return [one for one in scores if isinstance(one, dict) and one.get("name")] if isinstance(scores, list) else []


def _judged(score: dict[str, object]) -> tuple[str, object]:
    """Return the key and the id of the observation, the session or the experiment that a score judges; ("", None) for a trace."""
    narrow = ("observationId", "observation_id")
    wide = ("sessionId", "session_id", "datasetRunId", "dataset_run_id")
    keys = narrow if score.get("traceId") or score.get("trace_id") else (*narrow, *wide)
    return next(((key, score[key]) for key in keys if score.get(key)), ("", None))


def each_counted(value: object) -> list[str]:
    """Return each key of an object of counts as often as its value says: the votes that were counted.

    Raises:
        ValueError: a value that is no count.
    """
    found = opened(value)
    votes: list[str] = []
    for key, count in found.items() if isinstance(found, dict) else ():
        number = number_in(count)
        if number is None or not number.is_integer() or not 0 <= number <= _MOST_COUNTED:
            raise ValueError(f"{quoted(key)} is {quoted(count)}, which is no number of votes")
        votes += [key] * int(number)
    return votes


def gathered(values: object) -> dict[str, list[object]]:
    """Return the values of the objects in a list by key, those of lists one by one."""
    found: dict[str, list[object]] = {}
    for one in values if isinstance(values, list) else []:
        for key, value in one.items() if isinstance(one, dict) else ():
            inner = opened(value)
            found.setdefault(key, []).extend(inner if isinstance(inner, list) else [inner])
    return found


def submitted(record: object) -> dict[str, list[object]]:
    """Return the submitted answers to each question of an Argilla record, by the question's name.

    Drafts and discarded answers do not count. Where an answer has no status of its own, the record's status does.
    """
    if not isinstance(record, dict):
        return {}
    whole = record.get("status") not in ("pending", "draft", "discarded")
    found: dict[str, list[object]] = {}
    for name, values, statuses in _questions(record):
        kept = [
            value
            for value, status in zip(values, statuses, strict=True)
            if value is not None and (status == "submitted" or (status is None and whole))
        ]
        if kept:
            found[name] = kept
    return found


def _questions(record: dict[str, Any]) -> Any:
    """Yield (name, values, statuses) of each question, in the nested, the flat and the older form of the records."""
    inner = entered(record.get("responses"))
    for name, answers in inner.items() if isinstance(inner, dict) else ():
        yield name, *_answers(answers)
    yield from _by_question(inner) if isinstance(inner, list) else ()
    for key in record:
        if key.endswith(".responses"):
            values = entered(record[key])
            values = values if isinstance(values, list) else []
            statuses = entered(record.get(f"{key}.status"))
            fits = isinstance(statuses, list) and len(statuses) == len(values)
            yield key.removesuffix(".responses"), values, statuses if fits else [None] * len(values)
        elif f"{key}-suggestion" in record:
            yield key, *_answers(record[key])


def _by_question(responses: list[object]) -> Any:
    """Yield (name, values, statuses) from the responses of Argilla 1.x, each of which has the values of all questions."""
    found: dict[str, tuple[list[object], list[object]]] = {}
    for one in responses:
        values = one.get("values") if isinstance(one, dict) else None
        for name, answer in values.items() if isinstance(values, dict) else ():
            question = found.setdefault(name, ([], []))
            question[0].append(answer.get("value") if isinstance(answer, dict) else answer)
            question[1].append(one.get("status") if isinstance(one, dict) else None)
    for name, (answers, statuses) in found.items():
        yield name, answers, statuses


def _answers(value: object) -> tuple[list[object], list[object]]:
    found = entered(value)
    if isinstance(found, dict):  # a list of objects, as `datasets` stores it
        columns = {key: item for key, item in found.items() if isinstance(item, list)}
        values = columns.get("value", [])
        return values, columns.get("status", [None] * len(values))
    items = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return [one.get("value") for one in items], [one.get("status") for one in items]
