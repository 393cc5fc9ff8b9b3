"""Labels: which values mean what, what is left out, and what a message proposes for the values found."""

import json
import shlex
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_kto.kto_core.errors import ConfigError, FeedbackError
from offline_kto.kto_core.feedback.labels import DOWN, LEAVE_OUT, UP, LabelRule, is_tie
from offline_kto.kto_core.feedback.left_out import DEAD_ZONE, RATERS_DISAGREE, UNRATED, LeftOut
from offline_kto.kto_core.feedback.mapping_file import mapping_from
from offline_kto.kto_core.feedback.quoting import quoted
from offline_kto.kto_core.feedback.scales import Scale
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback


def verdict(rule, value):
    """True, False, or the reason for which it is left out; None if it is refused."""
    try:
        return rule.verdict(value, "f:1", "thumb")
    except LeftOut as left:
        return left.reason
    except FeedbackError:
        return None


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [
        ((">=4",), ("<=2",), {5: True, 4: True, "4.0": True, 3: DEAD_ZONE, 2: False, "1": False, "five": None}),
        (("1",), ("-1",), {1: True, -1: False, "-1": False, "1.0": True, 0: None, "": UNRATED}),
        (("like",), ("dislike",), {"Like": True, "DISLIKE": False, "love": None, True: None}),
        ((True,), (False,), {True: True, False: False, "true": True, 7: None}),
        (("4", "5"), ("<3",), {5: True, 3: DEAD_ZONE, 2.5: False}),
        ((">0",), ("<0",), {0.1: True, -3: False, 0: DEAD_ZONE, "n/a": UNRATED}),
        (("+1",), ("-1",), {"+1": True, "-1": False}),
        (("great, really",), ("no",), {"Great, really": True, "no": False}),
    ],
)
def test_values_up_and_down(up, down, expected):
    rule = LabelRule(up, down)
    assert {value: verdict(rule, value) for value in expected} == expected


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *((up, True) for up in (":+1:", " :+1: ", ":+1::skin-tone-3:", ":thumbsup::skin-tone-2:")),
        *((down, False) for down in (":-1:", ":-1::skin-tone-6:")),
        *((value, None) for value in ("- 1", "_1", "-_1", ": 1", "1-", "\u22121", "-0", "_0")),
    ],
)
def test_a_sign_before_a_digit_is_part_of_the_value(value, label):
    assert verdict(LabelRule(), value) is label
    assert verdict(LabelRule((":+1:",), (":-1:",)), value) in (label, None)


@pytest.mark.parametrize(("otherwise", "expected"), [(UP, True), (DOWN, False), (LEAVE_OUT, DEAD_ZONE)])
def test_what_happens_to_all_others(otherwise, expected):
    rule = LabelRule(("good",), ("bad",), otherwise)
    assert [verdict(rule, value) for value in ("good", "bad", "meh", 7, None)] == [
        True,
        False,
        expected,
        expected,
        UNRATED,
    ]


@pytest.mark.parametrize(
    ("up", "down", "otherwise", "part"),
    [
        (("a",), ("a",), "refuse", "in up and in down"),
        ((1,), ("1.0",), "refuse", "in up and in down"),
        (("",), (), "refuse", "up"),
        (([1],), (), "refuse", "up"),
        ((), (), "skip", "else"),
    ],
)
def test_rules_that_make_no_sense(up, down, otherwise, part):
    with pytest.raises(ConfigError, match=part):
        LabelRule(up, down, otherwise)


def test_several_raters():
    rule = LabelRule()
    values = [[True, True], [True, None], [True, False], [None, ""], ["up", 1]]
    assert [verdict(rule, value) for value in values] == [True, True, RATERS_DISAGREE, UNRATED, True]


def test_values_are_counted_with_their_destination():
    rule = LabelRule((">=4",), ("<=2",))
    for value in (5, 5, 3, 1, None, "x"):
        verdict(rule, value)
    assert rule.seen == {
        ("5", "up"): 2,
        ("3", "left out"): 1,
        ("1", "down"): 1,
        ("(none)", "left out"): 1,
        ('"x"', "unknown"): 1,
    }


@given(st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False))
def test_a_threshold_is_the_lowest_desirable_rating(rating):
    rule = LabelRule.at_least(3.5)
    for value in (rating, repr(rating)):
        assert verdict(rule, value) is (rating >= 3.5)


@pytest.mark.parametrize(
    ("value", "tie"),
    [
        *((word, True) for word in ("tie", "Tie", "tie (bothbad)", "both_bad", "equal", "neither", "draw", 0.5, "0.5")),
        *((word, False) for word in ("model_a", "left", "", None, 1, 0, 2, "timeout", True)),
    ],
)
def test_words_for_a_tie(value, tie):
    assert is_tie(value) is tie


PROPOSALS = [
    ([1, -1, -1], "--up 1 --down -1"),
    ([1, 0, -1, 0], "--up '>0' --down '<0' (0 is left out)"),
    ([0, 1], "--up 1 --down 0"),
    ([True, "nope"], "--up true --down nope"),
    ([True, "maybe"], ""),
    (["thumbsUp", "thumbsDown"], "--up thumbsUp --down thumbsDown"),
    (["hot", "cold"], "--up hot --down cold (or the other way round)"),
    (["really good", "not so"], "--up 'really good' --down 'not so' (or the other way round)"),
    (
        ["good", "bad", "meh"],
        "--up good --down bad, with meh added to one of them, or left out by a mapping (--map FILE) with `else: leave-out`",
    ),
    (["mixed", "dislike"], ""),
    (["bad", "not rated"], ""),
    (["\U0001f44e", "-"], ""),
    (["Offered", "good"], ""),
    (["no_rating", "fine"], ""),
    (["a", "b", "c"], ""),
    (["neutral", "negative"], ""),
    ([1, 2, 3, 4, 5], "--up '>=4' --down '<=2'"),
    (["5", "2"], "--up '>=4' --down '<=2'"),
    ([1, 2, 3], "--up '>=3' --down '<=1'"),
    ([0, 1, 2, 3, 4], "--up '>=3' --down '<=1'"),
    ([1, 10, 7], "--up '>=7' --down '<=4'"),
    (["90%", "20%"], "--up '>=70' --down '<=40'"),
    ([0.1, 0.93], "--up '>0.5' --down '<0.5' (0.5 is left out)"),
    ([1.0, 0.5, 0.0], "--up '>0.5' --down '<0.5' (0.5 is left out)"),
    (["5/5", "4/5", "1/5"], "--up 4/5,5/5 --down 1/5"),
    (["5/5", "4/5"], "--up 4/5,5/5 --down 0/5,1/5,2/5"),
    (["4 out of 5", "1 of 5"], "--up '4 out of 5' --down '1 of 5'"),
    (["4/5", "9/10"], ""),
    (["★★★★★", "★★"], "--up '★★★★★' --down '★★'"),
    (["⭐️⭐️⭐️", "⭐️"], "--up '⭐⭐⭐⭐,⭐⭐⭐⭐⭐' --down '⭐️', with ⭐️⭐️⭐️ added to one of them"),
    (["★★★★☆"], "--up '★★★★☆' --down '★☆☆☆☆,★★☆☆☆'"),
    (["★★★★", "fine"], ""),
    (["5/5", "3/5", "1/5"], "--up 5/5 --down 1/5, with 3/5 added to one of them"),
    (["'up'", "'down'"], """--up ''"'"'up'"'"'' --down ''"'"'down'"'"''"""),
    (["4,5", "1,5"], ""),
    ([{"v": 1}, {"v": 0}], ""),
    ([">=4", "good"], ""),
    (["x" * 100, "good"], ""),
    ([-0.4, 0.3], "--up '>0' --down '<0'"),
    ([0, 55, 100], "--up '>=70' --down '<=40'"),
    ([0, 1, 2], "--up '>=2' --down '<=0'"),
    ([1, 1, 1, 2000, 30, 5, 2], "--up '>=2' --down '<2'"),
    ([1, 1, 1, 2000], "--up '>=2000' --down '<2000'"),
    ([5, 5], ""),
    ([5, "great"], ""),
]


@pytest.mark.parametrize(("values", "proposal"), PROPOSALS)
def test_the_proposed_cut_fits_the_values(values, proposal):
    said = Scale(Counter(map(quoted, values))).proposal()
    assert said.startswith(proposal)
    assert bool(said) == bool(proposal)


OUTLIERS = [
    ([*range(1, 11), 85], "--up '>=7' --down '<=4'", "85 (1 time)"),
    ([*["1", "2", "3", "4", "5"] * 4, "99", "99"], "--up '>=4' --down '<=2'", "99 (2 times)"),
    ([*[1, 2, 3, 4, 5] * 4, *[-1] * 9], "--up '>=4' --down '<=2'", "-1 (9 times)"),
    ([*[0, 1] * 5, 99], "--up 1 --down 0", "99 (1 time)"),
    ([*[0, 1] * 5, -99], "--up 1 --down 0", "-99 (1 time)"),
    ([*[0.1, 0.5, 0.9] * 9, 20, 50], "", ""),
    ([*[0.1, 0.5, 0.9] * 20, 20, 50], "--up '>0.5' --down '<0.5'", "20 (1 time), 50 (1 time)"),
    ([*[1, 2, 3, 4, 5] * 40, 7], "--up '>=4' --down '<=2'", "7 (1 time)"),
    ([*[1, 2, 3, 4, 5] * 4, 7], "--up '>=7' --down '<=4'", ""),  # perhaps of 1 to 10
    ([*[0, 10, 20, 5] * 4, 100], "--up '>=70' --down '<=40'", ""),
    ([1, 9, 85], "--up '>=70' --down '<=40'", ""),
    ([*[3, 1, 0, 2] * 9, -1], "--up '>0' --down '<0'", ""),  # votes
    ([*[3, 1, 4, 2] * 9, -1, -2], "--up '>0' --down '<0'", ""),
]


@pytest.mark.parametrize(("values", "proposal", "far"), OUTLIERS)
def test_an_outlier_does_not_move_the_proposed_cut(values, proposal, far):
    said = Scale(Counter(map(quoted, values))).proposal()
    assert said.startswith(proposal)
    assert ("far from the others" in said) == bool(far)
    assert f"{far} {'is' if far.count('time') == 1 else 'are'} far" in said or not far


def test_an_outlier_contradicts_no_label(tmp_path):
    ratings = [*[1, 5] * 10, 99]
    records = [{**one, "label": one["rating"] == 5} for one in rows("rating", ratings)]
    assert not [note for note in feedback(tmp_path / "f.jsonl", records)[1].notes() if "contradicts" in note]


def test_values_are_listed_with_their_counts():
    values = [*[5] * 1200, *[4] * 7, *range(10, 20)]
    words = Scale(Counter(map(quoted, values))).in_words()
    assert words.startswith("5 (1,200 times), 4 (7 times), 10 (1 time)")
    assert words.endswith("and 4 more")


# In a file


def feedback(path, records, **options):
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    found = Feedback(PrecomputeConfig(model="m", data=str(path), **options), has_template=False)
    labels = []
    for row in found.rows():
        found.keep(row)
        labels.append(row.label)
    found.finish()
    return labels, found


def refusal(path, records, **options):
    with pytest.raises(FeedbackError) as caught:
        feedback(path, records, **options)
    return str(caught.value)


def rows(column, values):
    return [{"prompt": f"p{number}", "completion": "c", column: value} for number, value in enumerate(values)]


def options_in(message):
    """The options that a message proposes, as PrecomputeConfig takes them."""
    words = message.split("pass ", 1)[1].split(" (")[0].rstrip(".\n").split()
    words = words[: next((i for i, word in enumerate(words) if word == "Pass"), len(words))]
    pairs = zip(words[::2], words[1::2], strict=False)
    return {name[2:].replace("-", "_"): value.strip("'.") for name, value in pairs if name.startswith("--")}


@pytest.mark.parametrize("column", ["rating", "label", "score"])
@pytest.mark.parametrize(
    ("values", "counts", "expected"),
    [
        ([1, -1, 1], "1 (2 times), -1 (1 time)", [True, False, True]),
        ([5, 1, 3, 4], "5 (1 time), 1 (1 time)", [True, False, True]),
        ([0.9, 0.2], "0.9 (1 time), 0.2 (1 time)", [True, False]),
        ([90, 10, 50], "90 (1 time), 10 (1 time)", [True, False]),
        (["hot", "cold", "hot"], '"hot" (2 times), "cold" (1 time)', [True, False, True]),
    ],
)
def test_what_a_message_proposes_works(tmp_path, column, values, counts, expected):
    message = refusal(tmp_path / "f.jsonl", rows(column, values))
    assert counts in message
    assert "median" not in message
    assert feedback(tmp_path / "f.jsonl", rows(column, values), **options_in(message))[0] == expected


def test_no_label_lists_the_columns_that_look_like_feedback(tmp_path):
    records = [
        {
            "prompt": f"p{number}",
            "completion": "c",
            "id": number,
            "stars": stars,
            "helpful_votes": None,
            "accepted": stars > 3,
            "meta": {"thumb": "up" if stars > 3 else "down", "model": "m", "feedback": {"comment": "text", "value": 1}},
        }
        for number, stars in enumerate((5, 2, 4))
    ]
    message = refusal(tmp_path / "f.jsonl", records)
    assert "no record has a label (unrated: 3)" in message
    lines = [line.strip() for line in message.splitlines()[1:-1]]
    assert lines == [
        "stars: 5 (1 time), 2 (1 time), 4 (1 time); pass --label-field stars --up '>=4' --down '<=2'"
        " (values between them are left out)",
        "accepted: true (2 times), false (1 time); pass --label-field accepted",
        'meta.thumb: "up" (2 times), "down" (1 time); pass --label-field \'meta.thumb\'',
        "meta.feedback.value: 1 (3 times); pass --label-field 'meta.feedback.value'",
    ]
    for path in ("accepted", "meta.thumb"):
        assert feedback(tmp_path / "f.jsonl", records, label_field=path)[0] == [True, False, True]


def test_no_label_and_nothing_that_looks_like_one(tmp_path):
    message = refusal(tmp_path / "f.jsonl", [{"prompt": "p", "completion": "c", "id": 1}])
    assert '["prompt", "completion", "id"]' in message
    assert "--label-field" in message


@pytest.mark.parametrize(("label", "name"), [(True, "desirable"), (False, "undesirable")])
def test_one_class_is_refused_unless_it_is_meant(tmp_path, label, name):
    records = rows("label", [label, label, None])
    message = refusal(tmp_path / "f.jsonl", records)
    assert f"every row is {name}" in message
    assert f"{json.dumps(label)} (2 times)" in message
    assert "unrated: 1" in message
    assert "--one-class" in message
    assert feedback(tmp_path / "f.jsonl", records, one_class=True)[0] == [label, label]


def test_a_threshold_that_leaves_one_class_names_the_cut_that_fits(tmp_path):
    message = refusal(tmp_path / "f.jsonl", rows("rating", [1, -1, 1]), rating_threshold="4")
    assert "every row is undesirable" in message
    assert "--up 1 --down -1" in message


def test_unrated_rows_and_the_dead_zone_are_left_out(tmp_path):
    values = [5, None, "", "N/A", 3, 1]
    labels, found = feedback(tmp_path / "f.jsonl", rows("rating", values), up=">=4", down="<=2")
    assert labels == [True, False]
    assert found.found.left_out.counts == {UNRATED: 3, DEAD_ZONE: 1}


@pytest.mark.parametrize("column", ["label", "rating"])
def test_unknown_labels_are_not_defective_rows(tmp_path, column):
    message = refusal(tmp_path / "f.jsonl", rows(column, [1, 5, 4, 0]), on_bad_row="skip")
    assert "5 (1 time), 4 (1 time)" in message
    assert "`else: leave-out`" in message


def test_comparisons_apply_to_the_label_of_a_record_without_a_rating(tmp_path):
    options = {"up": ">=4", "down": "<=2"}
    assert feedback(tmp_path / "f.jsonl", rows("label", [5, 1, 3]), **options)[0] == [True, False]
    mixed = [*rows("rating", [5, 1]), *rows("label", [1, 0])]
    assert "some records have a label and others a rating" in refusal(tmp_path / "f.jsonl", mixed, **options)


def test_a_value_that_is_up_and_down_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'rating' is 3, which is up \(>=1\) and down \(<=5\)"):
        feedback(tmp_path / "f.jsonl", rows("rating", [7, 3]), up=">=1", down="<=5")


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "N"]), min_size=1, max_size=8),
        min_size=2,
        max_size=2,
        unique_by=str.casefold,
    )
)
def test_proposed_words_survive_a_shell(words):
    proposal = Scale(Counter(map(quoted, words))).proposal()
    if proposal.endswith("(or the other way round)"):
        _, up, _, down, *_ = shlex.split(proposal)
        assert (up, down) == tuple(words)


@pytest.mark.parametrize("votes", [[1, 0], [True, False], ["TRUE", "FALSE"], ["2", "0"]])
@pytest.mark.parametrize(
    "names",
    [
        *[("thumbs_up", "thumbs_down"), ("meta.likes", "meta.dislikes"), ("good", "bad"), ("upvoted", "downvoted")],
        *[("isLiked", "isDisliked"), ("nUpVotes", "nDownVotes"), ("thumbsUp", "thumbsDown")],
    ],
)
def test_columns_of_opposite_votes_are_read_together(tmp_path, names, votes):
    def record(*votes):
        values = {name.split(".")[-1]: vote for name, vote in zip(names, votes, strict=True)}
        return {"prompt": "p", "completion": "c", **({"meta": values} if "." in names[0] else values)}

    some, none = votes
    records = [record(some, none), record(none, none), record(none, some)]
    message = refusal(tmp_path / "f.jsonl", records)
    assert f"'{names[1]}' counts the opposite" in message
    fields = {shlex.split(line)[0] for line in message.split("--label-field ")[1:]}
    assert fields == {f"{{up: {names[0]}, down: {names[1]}}}"}
    labels, found = feedback(tmp_path / "f.jsonl", records, label_field=fields.pop())
    assert labels == [True, False]
    assert found.found.left_out.counts == {UNRATED: 1}


def test_columns_of_opposite_words_are_joined_in_a_mapping(tmp_path):
    records = [{"prompt": "p", "completion": "c", "likes": one, "dislikes": other} for one, other in ("ab", "ba")]
    message = refusal(tmp_path / "f.jsonl", records)
    assert "neither is the label alone: join them in a mapping (--map FILE)" in message
    assert "--label-field" not in message


@pytest.mark.parametrize("value", ["maybe", 1.5, -1, None, True])
def test_a_number_of_votes_is_a_whole_number_or_a_flag(tmp_path, value):
    records = [{"prompt": "p", "completion": "c", "up": value, "down": 1}]
    assert "Write a whole number of votes" in refusal(tmp_path / "f.jsonl", records)


def test_ratings_with_a_decimal_comma_are_named(tmp_path):
    assert "with a point" in refusal(tmp_path / "f.jsonl", rows("rating", ["4,5", "1,5"]), up=">=4", down="<=2")


def test_a_column_of_what_is_undesirable_is_reversed(tmp_path):
    records = [{"prompt": f"p{n}", "completion": "c", "toxic": n == 1, "harm_score": n / 2} for n in range(3)]
    message = refusal(tmp_path / "f.jsonl", records)
    assert "pass --label-field toxic --up false --down true" in message
    assert "--label-field harm_score --up ... --down ..." in message
    options = {"label_field": "toxic", "up": "false", "down": "true"}
    assert feedback(tmp_path / "f.jsonl", records, **options)[0] == [True, False, True]


@pytest.mark.parametrize(
    "column",
    [
        "toxic",
        "is_bad",
        "thumbs_down",
        "harmful",
        "flagged",
        "dislike",
        "incorrect",
        "has_error",
        "hallucination",
        "checks.unsafe",
        *(
            "issue",
            "has_bugs",
            "isBroken",
            "low_quality",
            "biased",
            "off-topic",
            "contains_pii",
            "edited",
            "regenerated",
            "churned",
            "hasIssue",
        ),
    ],
)
@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), ("yes", "no"), ("1", "0")])
def test_a_label_of_what_is_undesirable_is_refused_with_both_readings(tmp_path, column, yes, no):
    def record(value):
        outer, _, inner = column.rpartition(".")
        return {"prompt": "p", "completion": "c", **({outer: {inner: value}} if outer else {inner: value})}

    records = [record(value) for value in (yes, no, no, None)]
    message = refusal(tmp_path / "f.jsonl", records, label_field=column)
    proposed = [shlex.split(words)[:5] for words in message.split("--label-field ")[1:]]
    found = []
    for name, _, up, _, down in proposed:
        options = {"label_field": name, "up": up, "down": down.rstrip(",")}
        found.append(feedback(tmp_path / "f.jsonl", records, **options)[0])
    assert found == [[False, True, True], [True, False, False]]


def test_a_label_of_messages_or_a_mapping_that_is_undesirable_is_refused(tmp_path):
    def turns(value):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thumbs_down": value}]

    records = [{"messages": turns(value)} for value in (True, False)]
    assert "--up false --down true" in refusal(tmp_path / "f.jsonl", records, label_field="thumbs_down")
    records = [{"q": "p", "a": "c", "spam": value} for value in (True, False)]
    (tmp_path / "m.yaml").write_text("prompt: q\ncompletion: a\nlabel: spam\n", encoding="utf-8")
    assert "--up false --down true" in refusal(tmp_path / "f.jsonl", records, map=str(tmp_path / "m.yaml"))
    (tmp_path / "m.yaml").write_text("prompt: q\ncompletion: a\nlabel: {path: spam, up: [false], down: [true]}\n")
    assert feedback(tmp_path / "f.jsonl", records, map=str(tmp_path / "m.yaml"))[0] == [False, True]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("not_toxic", [True, False]),
        ("error_free", [1, 0]),
        ("non_toxic", ["yes", "no"]),
        ("harmless", [True, False]),
        ("good_or_bad", ["good", "bad"]),
        ("thumbs_up_or_thumbs_down", ["up", "down"]),
        ("!toxic", [None, None]),
    ],
)
def test_names_and_words_that_say_which_side_is_good_are_read(tmp_path, column, values):
    records = [{**one, "toxic": toxic} for one, toxic in zip(rows(column, values), ("", "x"), strict=True)]
    assert feedback(tmp_path / "f.jsonl", records, label_field=column if column[0] == "!" else f'"{column}"')[0] == [
        True,
        False,
    ]


def test_a_scale_of_what_is_undesirable_is_not_proposed_as_it_is(tmp_path):
    message = refusal(tmp_path / "f.jsonl", rows("toxicity", [0.9, 0.1, 0.5]), label_field="toxicity")
    assert "Name the desirable values with --up" in message
    assert "'>0.5'" not in message


def test_a_proposal_for_votes_with_zero_works(tmp_path):
    records = rows("label", [1, 0, -1])
    assert "--up '>0' --down '<0'" in refusal(tmp_path / "f.jsonl", records)
    assert feedback(tmp_path / "f.jsonl", records, up=">0", down="<0")[0] == [True, False]


@pytest.mark.parametrize("scale", [(5, 1), (1,), ("a", "b")])
def test_a_scale_is_two_numbers_in_order(tmp_path, scale):
    with pytest.raises(ConfigError, match="the lowest and the highest rating"):
        mapping_from({"prompt": "p", "completion": "c", "label": {"path": "r", "scale": list(scale)}}, "m.yaml")


@pytest.mark.parametrize("column", ["rating", "stars", "meta_score"])
@pytest.mark.parametrize("value", [1, 1.0, "1"])
@pytest.mark.parametrize("one_class", [False, True])
def test_a_rating_that_is_always_one_has_no_known_scale(tmp_path, column, value, one_class):
    records = rows(column, [value, value, None])
    message = refusal(tmp_path / "f.jsonl", records, label_field=column, one_class=one_class)
    assert f"'{column}' is 1 wherever it has a value" in message
    proposed = [shlex.split(words)[:6] for words in message.split("--label-field ")[1:]]
    assert len(proposed) == 2
    for (name, _, up, _, down, *_), label in zip(proposed, (True, False), strict=True):
        options = {"label_field": name, "up": up, "down": down, "one_class": True}
        assert feedback(tmp_path / "f.jsonl", records, **options)[0] == [label, label]


@pytest.mark.parametrize(
    ("column", "values", "labels"),
    [
        ("rating", [1, 0, 1], [True, False, True]),
        ("rating", [True, 1, 1], [True, True, True]),
        ("label", [1, 1], [True, True]),
        ("thumb", ["1", "1"], [True, True]),
        ("rating", [0, 0], [False, False]),
        ("score", ["up", "up"], [True, True]),
    ],
)
def test_other_columns_of_ones_are_read_as_before(tmp_path, column, values, labels):
    assert feedback(tmp_path / "f.jsonl", rows(column, values), label_field=column, one_class=True)[0] == labels


def test_a_rating_of_messages_that_is_always_one_has_no_known_scale(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "rating": 1}]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert "'rating' is 1 wherever" in refusal(tmp_path / "f.jsonl", [{"messages": turns}, pair])


def test_a_format_defines_the_scale_of_its_score(tmp_path):
    records = [{"instruction": "q", "response": "a", "score": 1} for _ in range(2)]
    assert feedback(tmp_path / "f.jsonl", records, one_class=True)[0] == [True, True]


@pytest.mark.parametrize(
    ("column", "values", "against", "proposal"),
    [
        ("rating", [5, 1, 4, 2], 2, "--label-field rating --up '>=4' --down '<=2' (values between them are left out)"),
        ("rating", [1, 5, 3, 3], 0, ""),
        ("thumbs", [1, 1, -1, -1], 2, "--label-field thumbs --up 1 --down -1"),
        ("stars", ["1", "5", "5", "5"], 1, "--label-field stars --up '>=4' --down '<=2'"),
        ("feedback", ["up", "down", "", None], 2, "--label-field feedback"),
        ("score", [0.9, 0.1, 0.9, 0.1], 2, "--label-field score --up '>0.5' --down '<0.5'"),
        ("reward", [number / 100 for number in range(-40, 40)], 0, ""),
        ("comment", ["up", "down", "up", "down"], 0, ""),
    ],
)
def test_a_column_that_contradicts_the_label_is_named(tmp_path, column, values, against, proposal):
    records = [{**one, "label": number % 4 in (1, 2)} for number, one in enumerate(rows(column, values))]
    labels, found = feedback(tmp_path / "f.jsonl", records)
    assert labels == [number % 4 in (1, 2) for number in range(len(values))]
    notes = [note for note in found.notes() if "contradicts" in note]
    assert len(notes) == bool(against)
    for note in notes:
        assert f"in {against} of {sum(value not in ('', None) for value in values)} rows (first: f.jsonl:" in note
        assert proposal in note


@pytest.mark.parametrize(
    ("column", "values", "against", "proposal"),
    [
        ("user_feedback", [["up"], ["down"], [], None], "2 of 2 rows", "--label-field user_feedback."),
        ("user_feedback", [["up", "up"], ["up", "down"], '["up"]', '["down"]'], "1 of 3 rows", "user_feedback."),
        ("rating", [5, None, None, None], "1 of 1 row", "--up ... --down ... for its values."),
        ("rating", [None, "0", "", None], "1 of 1 row", "--label-field rating."),
        ("thumbs", [1, None, None, 1], "2 of 2 rows", "--label-field thumbs."),
        ("rating", [1, None, None, 1], "", ""),  # the best of 0 and 1, or the worst of 1 to 5
        ("rating", [3, None, None, 3], "", ""),
        ("rating", [5, 5, None, None], "", ""),  # beside both labels
    ],
)
def test_lists_and_numbers_alone_are_compared_with_the_label(tmp_path, column, values, against, proposal):
    records = [{**one, "label": number % 4 in (1, 2)} for number, one in enumerate(rows(column, values))]
    notes = [note for note in feedback(tmp_path / "f.jsonl", records)[1].notes() if "contradicts" in note]
    assert len(notes) == bool(against)
    for note in notes:
        assert f"'{column}' contradicts the label that was read in {against} (first: f.jsonl:" in note
        assert note.endswith(proposal)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "column",
    ["verdict", "human_label", "gold_label", "final_label", "label2", "is_correct", "flagged", "harmful", "is_valid"],
)
@pytest.mark.parametrize("opposite", [0, 1, 2, 3, 4])
def test_most_rows_must_contradict_a_column_of_a_similar_name(tmp_path, form, column, opposite):
    labels = [True, False, True, False]
    same = [value is (column not in ("flagged", "harmful")) for value in labels]
    values = [value is (number >= opposite) for number, value in enumerate(same)]
    records = [{**one, "label": label} for one, label in zip(rows(column, values), labels, strict=True)]
    path = tmp_path / f"f.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    found = Feedback(PrecomputeConfig(model="m", data=str(path)), has_template=False)
    for row in found.rows():
        found.keep(row)
    found.finish()
    notes = [note for note in found.notes() if "contradicts" in note]
    assert len(notes) == (opposite > 2)
    for note in notes:
        assert f"'{column}' contradicts the label that was read in {opposite} of 4 rows" in note
        assert ("--up false --down true" in note) == (column in ("flagged", "harmful"))


def test_a_label_that_contradicts_the_rating_that_is_read_is_named(tmp_path):
    records = [{**one, "label": number == 0} for number, one in enumerate(rows("rating", [5, 1, 5]))]
    labels, found = feedback(tmp_path / "f.jsonl", records, up=">=4", down="<=2")
    assert labels == [True, False, True]
    (note,) = found.notes()
    assert note.startswith(
        "'label' contradicts the label that was read in 1 of 3 rows (first: f.jsonl:3: desirable, but"
    )


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (["1", 1, "0", 0], {}),
        ([True, "true", "false", False], {}),
        ([1.0, "TRUE", "0.0", "no"], {}),
        (["Up ", True, " down", 0], {}),
        ([5, "5", "1", 1.0], {"up": ">=4", "down": "<=2"}),
        ([True, "True", "False", False], {"up": "true", "down": "false"}),
        (["5", 5.0, 1, "1.0"], {"up": "5", "down": "1"}),
    ],
)
def test_a_column_may_mix_types(tmp_path, values, options):
    labels, _ = feedback(tmp_path / "f.jsonl", rows("label", values), **options)
    assert labels == [True, True, False, False]


def test_usual_words_beside_those_of_the_options_are_named(tmp_path):
    message = refusal(tmp_path / "f.jsonl", rows("label", [True, 1, 0, False]), up="1", down="0")
    assert "f.jsonl:1: 'label' is true, which is neither up nor down" in message
    assert "remove --up and --down" in message


@pytest.mark.parametrize(("up", "down"), [("good,bad", "bad"), ("Good", "good"), ("1", "1.0")])
def test_a_word_that_is_up_and_down_names_the_options(tmp_path, up, down):
    with pytest.raises(ConfigError, match=r"^--up and --down: .* is in up and in down"):
        feedback(tmp_path / "f.jsonl", rows("label", [1, 0]), up=up, down=down)


def test_a_rating_beside_an_empty_label_says_how_to_leave_it_out(tmp_path):
    records = [{**one, "rating": 4} for one in rows("label", [True, None, False])]
    message = refusal(tmp_path / "f.jsonl", records)
    assert (
        "f.jsonl:2: there is a rating, 4, but no label. To leave out records without a label, pass --label-field label"
        in message
    )
    labels, found = feedback(tmp_path / "f.jsonl", records, label_field="label")
    assert labels == [True, False]
    assert found.found.left_out.counts == {UNRATED: 1}


@pytest.mark.parametrize(
    ("name", "is_unclear"),
    [
        *((name, True) for name in ("rating", "stars", "score", "nps", "nps_answer", "csat", "labels.rating")),
        *((name, False) for name in ("thumb", "label", "liked", "thumbs_up", "starts")),
    ],
)
@pytest.mark.parametrize("value", [1, "1", [1, 1]])
def test_a_field_named_like_a_rating_is_unclear_if_it_is_always_1(name: str, is_unclear: bool, value: object) -> None:
    rule = LabelRule()
    assert rule.verdict(value, "f.jsonl:1", name)
    assert (rule.unclear_rating() == name) is is_unclear
    assert not rule.verdict(0, "f.jsonl:2", name)
    assert rule.unclear_rating() is None


def test_names_with_commas_are_objectives(tmp_path):
    records = [
        {
            "prompt": f"p{n}",
            "completion": "c",
            "helpful": n > 0,
            "is-polite": n > 1,
            "toxic": n == 1,
            "quality": n,
            "spam": n,
        }
        for n in range(3)
    ]
    path = tmp_path / "f.jsonl"
    labels, found = feedback(path, records, label_field="helpful,is-polite")
    assert labels == [False, True, True]
    assert found.unused_columns() == ["toxic", "quality", "spam"]
    message = refusal(path, records, label_field="helpful,toxic")
    assert "one of the labels is 'toxic', which seems to name what is undesirable" in message
    for option in ({"rating_scale": "0:5"}, {"rating_threshold": "2"}):
        for name in ("quality,spam", "{good: quality, safe: spam}", "{harm: quality, other: quality}"):
            assert "one of the labels is '" in refusal(path, records, label_field=name, **option)
    assert 'nothing at "x, y"' in refusal(path, records, label_field="x,y")


@pytest.mark.parametrize("name", ["helpful,plite", "{one: helpful, other: plite}"])
def test_an_objective_that_no_record_has_is_refused(tmp_path, name):
    records = [{"prompt": f"p{n}", "completion": "c", "helpful": n > 0, "polite": n > 1} for n in range(3)]
    message = refusal(tmp_path / "f.jsonl", records, label_field=name)
    assert """--label-field: no record has a value at "plite". Did you mean 'polite'?""" in message


def test_a_column_whose_name_has_a_comma_is_read(tmp_path):
    for name in ("Good, or bad", "good, bad"):
        assert feedback(tmp_path / "f.jsonl", rows(name, [1, 0]), label_field=name)[0] == [True, False]


def test_an_empty_label_beside_a_kto_tag_is_no_label(tmp_path):
    values = [("", True), (None, "false"), ("yes", "n/a"), ("", "")]
    records = [{**one, "kto_tag": tag} for one, (_, tag) in zip(rows("label", values), values, strict=True)]
    records = [{**one, "label": label} for one, (label, _) in zip(records, values, strict=True)]
    labels, found = feedback(tmp_path / "f.jsonl", records)
    assert labels == [True, False, True]
    assert found.found.left_out.counts == {UNRATED: 1}


@pytest.mark.parametrize("as_text", [False, True])
def test_the_vote_in_an_object_that_contradicts_the_label_is_named(tmp_path, as_text):
    given = [{"score": 0, "comment": "wrong"}, {"score": 1}, {"score": 0}]
    records = rows("feedback", [json.dumps(one) if as_text else one for one in given])
    found = feedback(tmp_path / "f.jsonl", [{**one, "label": number == 0} for number, one in enumerate(records)])[1]
    (note,) = [note for note in found.notes() if "contradicts" in note]
    assert note.startswith(
        "'feedback.score' contradicts the label that was read in 2 of 3 rows (first: f.jsonl:1: desirable"
    )
    assert "pass --label-field feedback.score" in note


def test_counts_of_votes_in_several_columns_must_agree(tmp_path):
    records = [{**one, "down": 1, "upvotes": one["up"], "downvotes": 1} for one in rows("up", [3, 0])]
    assert feedback(tmp_path / "f.jsonl", records)[0] == [True, False]
    message = refusal(tmp_path / "f.jsonl", [*records, {**records[0], "upvotes": 0}])
    assert "f.jsonl:3: 'up' and 'down' are 3 and 1, but 'upvotes' and 'downvotes' are 0 and 1" in message
    assert feedback(tmp_path / "f.jsonl", records, label_field="{up: up, down: down}")[0] == [True, False]


def test_columns_that_count_votes_contradict_nothing_alone(tmp_path):
    records = [{**one, "label": True} for one in rows("downvotes", [1, 0])]
    found = feedback(tmp_path / "f.jsonl", records, label_field="label", one_class=True)[1]
    assert not [note for note in found.notes() if "contradicts" in note]


def test_votes_that_are_objects_are_explained(tmp_path):
    votes = [[{"who": "a", "label": 1}, {"who": "b", "label": 0}], [{"who": "a", "label": 0}]]
    records = rows("labels", votes)
    message = refusal(tmp_path / "f.jsonl", records)
    assert "Name what is the vote in them: --label-field 'labels[].label'." in message
    assert feedback(tmp_path / "f.jsonl", records, label_field="labels[].label")[0] == [True, False]
    records = rows("votes", [[{"user": "a", "value": 1}], [{"user": "b", "value": -1}]])
    message = refusal(tmp_path / "f.jsonl", records)
    assert "votes[].value: 1 (1 time), -1 (1 time); pass --label-field 'votes[].value' --up 1 --down -1" in message


@pytest.mark.parametrize("column", ["withdrawn", "retracted", "deleted_at"])
def test_votes_that_were_withdrawn_are_named(tmp_path, column):
    records = [{**one, column: value} for one, value in zip(rows("label", [1, 0]), ("2025-01-01", None), strict=True)]
    notes = feedback(tmp_path / "f.jsonl", records)[1].notes()
    assert len([note for note in notes if f"'{column}' suggests that the answer failed" in note]) == 1


@pytest.mark.parametrize("value", ["up, down, up", "up", "yes|no", 1, True])
def test_votes_in_a_text_of_several_labels_are_not_unrated(tmp_path, value):
    records = [*rows("labels", [value]), *rows("label", [True, False])]
    message = refusal(tmp_path / "f.jsonl", records)
    assert f"f.jsonl:1: 'labels' is {json.dumps(value)}, which is no list and no object" in message
    labels, found = feedback(tmp_path / "f.jsonl", [*rows("labels", ["travel, food"]), *records[1:]])
    assert (labels, found.found.left_out.counts) == ([True, False], {UNRATED: 1})


def test_a_label_of_a_problem_that_was_solved_is_read(tmp_path):
    for column in ("issue_resolved", "problemSolved", "unbiased", "no_issues", "bug_free"):
        records = [{"prompt": "p", "completion": "c", column: value} for value in (True, False)]
        assert feedback(tmp_path / "f.jsonl", records, label_field=column)[0] == [True, False]


def test_one_flag_beside_both_labels_contradicts_none(tmp_path):
    records = [
        {"prompt": "p", "completion": "c", "label": label, "deleted": False} for label in (True, False, False, False)
    ]
    assert not [note for note in feedback(tmp_path / "f.jsonl", records)[-1].notes() if "contradicts" in note]
