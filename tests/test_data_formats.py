"""Data sets and files of trainers as they are: what each becomes was written by hand, from what their authors document."""

import csv
import gzip
import io
import json
import re
import shlex

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offline_kto.kto_core.errors import ConfigError, FeedbackError, KTOError
from offline_kto.kto_core.feedback.left_out import (
    CORRECTED,
    EMPTY,
    MEDIA,
    NOT_CHOSEN,
    OTHER_SPLIT,
    SAME_ANSWERS,
    TIE,
    UNRATED,
)
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.feedback.rows import Feedback


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def turns(*texts):
    """The user's and the assistant's texts in turn."""
    return [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]


def read(path, *, one_class=True, **options):
    """Return ([(turns of the prompt, answer, label, whether it is one of a pair)], left out by reason, feedback)."""
    config = PrecomputeConfig(model="m", data=str(path), one_class=one_class, **options)
    feedback = Feedback(config, has_template=True)
    found = list(feedback.rows())
    for row in found:
        feedback.keep(row)
    feedback.finish()
    rows = []
    for row in found:
        (answer,) = row.completion
        assert answer["role"] == "assistant"
        prompt = [(one["role"], one["content"]) for one in row.prompt]
        roles = [role for role, _ in prompt if role != "system"]
        assert roles == [("user", "assistant")[number % 2] for number in range(len(roles))]
        texts = [f"system: {text}" if role == "system" else text for role, text in prompt]
        rows.append(([*texts, answer["content"]], row.label, row.pair_id is not None))
    return rows, dict(feedback.found.left_out.counts), feedback


def refusal(path, error=FeedbackError, **options):
    with pytest.raises(error) as caught:
        read(path, **options)
    return str(caught.value)


# Containers


def as_jsonl(folder, records):
    path = folder / "f.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


def as_packed(folder, records):
    path = folder / "f.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(one) for one in records).encode()))
    return path


def as_json(folder, records):
    path = folder / "f.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def as_document(folder, records):
    path = folder / "f.json"
    path.write_text(json.dumps({"version": 3, "results": records}), encoding="utf-8")
    return path


def as_csv(folder, records):
    """Cells as a careful program writes them: text as it is, all else as JSON, nothing for null."""
    columns = list(dict.fromkeys(name for one in records for name in one))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for one in records:
        cells = (one.get(name) for name in columns)
        writer.writerow("" if cell is None else cell if isinstance(cell, str) else json.dumps(cell) for cell in cells)
    path = folder / "f.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def as_parquet(folder, records):
    path = folder / "f.parquet"
    columns = list(dict.fromkeys(name for one in records for name in one))
    pq.write_table(pa.table({name: [one.get(name) for one in records] for name in columns}), path)
    return path


def as_saved(folder, records):
    path = folder / "saved"
    columns = list(dict.fromkeys(name for one in records for name in one))
    datasets.Dataset.from_dict({name: [one.get(name) for one in records] for name in columns}).save_to_disk(path)
    return path


CONTAINERS = [as_jsonl, as_packed, as_json, as_document, as_csv, as_parquet, as_saved]


def up(*texts):
    return list(texts), True, False


def down(*texts):
    return list(texts), False, False


def pair(prompt, chosen, rejected):
    """The two rows of a pair; prompt: a text, or a list of them."""
    begin = [prompt] if isinstance(prompt, str) else prompt
    return [([*begin, chosen], True, True), ([*begin, rejected], False, True)]


ARENA = {"question_id": "7", "model_a": "m", "model_b": "n", "language": "English"}
ARENA_55K = {"id": 1, "model_a": "m", "model_b": "n"}
WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
SHP = {"post_id": "p", "domain": "d", "score_A": 8, "score_B": 2}
PKU = {"prompt": "How?", "response_0": "Like so.", "response_1": "No idea."}
STEER = {"complexity": 1, "verbosity": 2}
OASST = {"message_tree_id": "t", "lang": "en"}
PRISM = {"utterance_id": "u", "conversation_id": "c", "user_prompt": "q", "model_name": "m"}
# Instruction and output are those of a judge.
PROMETHEUS = {"instruction": "Judge this.", "output": "[RESULT] 5", "orig_instruction": "q"}

# (format, records, rows, left out by reason)
DATA = [
    (
        "UltraFeedback",
        [
            {
                "source": "s",
                "instruction": "Name a river.",
                "models": ["a", "b", "c", "d"],
                "completions": [
                    {"response": "The Rhine.", "overall_score": 8.5, "annotations": {"honesty": {"Rating": "N/A"}}},
                    {"response": "Rivers.", "overall_score": 3.0, "annotations": {"honesty": {"Rating": "2"}}},
                    {"response": "A lake.", "overall_score": 5.0, "annotations": {"honesty": {"Rating": "3"}}},
                    {"response": "  ", "overall_score": 1.0, "annotations": {"honesty": {"Rating": "1"}}},
                ],
                "correct_answers": ["x"],
            }
        ],
        [up("Name a river.", "The Rhine."), down("Name a river.", "Rivers.")],
        {"between up and down": 1, EMPTY: 1},
    ),
    (
        "distilabel ratings",
        [
            {"instruction": "q", "generations": ["a", "b", "c"], "ratings": [5, 2, 3], "rationales": ["", "", ""]},
            {"instruction": "r", "generations": ["d", "e"], "ratings": None, "rationales": None},
            {"instruction": "s", "generations": ["f"], "ratings": [4], "rationales": ["x"]},
        ],
        [up("q", "a"), down("q", "b"), up("s", "f")],
        {"between up and down": 1, UNRATED: 2},
    ),
    (
        "Chatbot Arena",
        [
            {**ARENA, "winner": "model_a", "conversation_a": turns("q", "a"), "conversation_b": turns("q", "b")},
            {**ARENA, "winner": "model_b", "conversation_a": turns("r", "c"), "conversation_b": turns("r", "d")},
            {**ARENA, "winner": "tie", "conversation_a": turns("s", "e"), "conversation_b": turns("s", "f")},
            {**ARENA, "winner": "tie (bothbad)", "conversation_a": turns("s", "e"), "conversation_b": turns("s", "g")},
            {
                **ARENA,
                "winner": "model_b",
                "conversation_a": turns("t", "h", "u", "i"),
                "conversation_b": turns("t", "j", "u", "k"),
            },
        ],
        [*pair("q", "a", "b"), *pair("r", "d", "c"), up("t", "j", "u", "k"), down("t", "h", "u", "i")],
        {TIE: 2},
    ),
    (
        "Chatbot Arena 55k",
        [
            {
                **ARENA_55K,
                "prompt": '["q", "r"]',
                "response_a": '["a", "b"]',
                "response_b": '["c", "d"]',
                **dict(zip(WINNERS, (0, 1, 0), strict=True)),
            },
            {
                **ARENA_55K,
                "prompt": '["s"]',
                "response_a": '["e"]',
                "response_b": '["f"]',
                **dict(zip(WINNERS, (1, 0, 0), strict=True)),
            },
            {
                **ARENA_55K,
                "prompt": '["t"]',
                "response_a": '["g"]',
                "response_b": '["h"]',
                **dict(zip(WINNERS, (0, 0, 1), strict=True)),
            },
            {
                **ARENA_55K,
                "prompt": '["t"]',
                "response_a": "[null]",
                "response_b": '["h"]',
                **dict(zip(WINNERS, (0, 1, 0), strict=True)),
            },
        ],
        [up("q", "c", "r", "d"), down("q", "a", "r", "b"), *pair("s", "e", "f")],
        {TIE: 1, EMPTY: 1},
    ),
    (
        "Chatbot Arena",
        [
            {
                "id": "1",
                "winner": "both_bad",
                "conversation_a": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]}],
                "conversation_b": [{"role": "user", "content": [{"type": "text", "text": "q", "image": None}]}],
            },
            {
                "id": "2",
                "winner": "model_a",
                "conversation_a": [
                    {"role": side, "content": [{"type": "text", "text": text, "image": None}]}
                    for side, text in (("user", "r"), ("assistant", "a"))
                ],
                "conversation_b": [
                    {"role": side, "content": [{"type": "text", "text": text, "image": None}]}
                    for side, text in (("user", "r"), ("assistant", "b"))
                ],
            },
        ],
        pair("r", "a", "b"),
        {TIE: 1},
    ),
    (
        "Stanford Human Preferences",
        [
            {**SHP, "history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 4.0},
            {
                **SHP,
                "history": "i",
                "human_ref_A": "c",
                "human_ref_B": "d",
                "labels": 0,
                "score_ratio": 2.0,
                "score_A": 1,
            },
            {
                **SHP,
                "history": "j",
                "human_ref_A": "e",
                "human_ref_B": "f",
                "labels": 0,
                "score_ratio": 1.5,
                "score_A": 1,
            },
        ],
        [*pair("h", "a", "b"), *pair("i", "d", "c")],
        {NOT_CHOSEN: 1},
    ),
    (
        "PKU-SafeRLHF, the better response",
        [
            {**PKU, "is_response_0_safe": True, "is_response_1_safe": False, "better_response_id": 0},
            {**PKU, "is_response_0_safe": True, "is_response_1_safe": True, "better_response_id": 1},
        ],
        [*pair("How?", "Like so.", "No idea."), *pair("How?", "No idea.", "Like so.")],
        {},
    ),
    (
        "HelpSteer",
        [
            {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 4, "coherence": 4, **STEER},
            {"prompt": "q", "response": "b", "helpfulness": 0, "correctness": 0, "coherence": 4, **STEER},
            {"prompt": "q", "response": "c", "helpfulness": 2, "correctness": 3, "coherence": 4, **STEER},
            {
                "prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr",
                "response": "d",
                "helpfulness": 3,
                "correctness": 3,
                "coherence": 4,
                **STEER,
            },
        ],
        [up("q", "a"), down("q", "b"), up("q", "a", "r", "d")],
        {"between up and down": 1},
    ),
    (
        "HelpSteer2 preferences",
        [
            {"split": "train", "prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -3},
            {"split": "train", "prompt": "r", "response_1": "c", "response_2": "d", "preference_strength": 1},
            {"split": "train", "prompt": "s", "response_1": "e", "response_2": "f", "preference_strength": 0},
            {"split": "validation", "prompt": "t", "response_1": "g", "response_2": "h", "preference_strength": 2},
        ],
        [*pair("q", "a", "b"), *pair("r", "d", "c")],
        {TIE: 1, OTHER_SPLIT: 1},
    ),
    (
        "HelpSteer3 preferences",
        [
            {"context": turns("q"), "response1": "a", "response2": "b", "overall_preference": 2},
            {"context": turns("q", "c", "r"), "response1": "d", "response2": "e", "overall_preference": -1},
            {"context": turns("s"), "response1": "f", "response2": "g", "overall_preference": 0},
        ],
        [*pair("q", "b", "a"), *pair(["q", "c", "r"], "d", "e")],
        {TIE: 1},
    ),
    (
        "WebGPT comparisons",
        [
            {"question": {"full_text": "Why?"}, "answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": -0.5},
            {"question": {"full_text": "How?"}, "answer_0": "c", "answer_1": "d", "score_0": -1.0, "score_1": 1.0},
            {"question": {"full_text": "Who?"}, "answer_0": "e", "answer_1": "f", "score_0": 0.0, "score_1": 0.0},
        ],
        [*pair("Why?", "a", "b"), *pair("How?", "d", "c")],
        {TIE: 1},
    ),
    (
        "summarize_from_feedback",
        [
            {
                "info": {"id": "1", "post": "A long post.", "article": None},
                "summaries": [{"text": "a"}, {"text": "b"}],
                "choice": 1,
                "split": "train",
            },
            {
                "info": {"id": "2", "post": None, "article": "An article."},
                "summaries": [{"text": "c"}, {"text": "d"}],
                "choice": 0,
                "split": "train",
            },
            {
                "info": {"id": "3", "post": "Held out.", "article": None},
                "summaries": [{"text": "e"}, {"text": "f"}],
                "choice": 0,
                "split": "valid1",
            },
        ],
        [*pair("A long post.", "b", "a"), *pair("An article.", "c", "d")],
        {OTHER_SPLIT: 1},
    ),
    (
        "OpenAssistant messages",
        [
            # An answer may stand before its question.
            {
                **OASST,
                "message_id": "2",
                "parent_id": "1",
                "text": "a",
                "role": "assistant",
                "rank": 1,
                "deleted": False,
            },
            {
                **OASST,
                "message_id": "1",
                "parent_id": None,
                "text": "q",
                "role": "prompter",
                "rank": None,
                "deleted": False,
            },
            {
                **OASST,
                "message_id": "3",
                "parent_id": "1",
                "text": "b",
                "role": "assistant",
                "rank": 0,
                "deleted": False,
            },
            {
                **OASST,
                "message_id": "4",
                "parent_id": "1",
                "text": "c",
                "role": "assistant",
                "rank": 2,
                "deleted": True,
            },
            {
                **OASST,
                "message_id": "5",
                "parent_id": "3",
                "text": "r",
                "role": "prompter",
                "rank": None,
                "deleted": False,
            },
            {
                **OASST,
                "message_id": "6",
                "parent_id": "5",
                "text": "d",
                "role": "assistant",
                "rank": 0,
                "deleted": False,
            },
            {
                **OASST,
                "message_id": "7",
                "parent_id": "5",
                "text": "e",
                "role": "assistant",
                "rank": 1,
                "deleted": False,
            },
        ],
        [*pair("q", "b", "a"), *pair(["q", "b", "r"], "d", "e")],
        {"deleted": 1},
    ),
    (
        "HALOs binary feedback",
        [
            {
                "prompt_id": "1",
                "prompt": turns("q"),
                "output": [assistant(answer)],
                "label": label,
                "reward": 0.3,
                "type": "binary_feedback",
                "split": split,
            }
            for answer, label, split in (("a", 1, "train"), ("b", 0, "train"), ("c", 1, "test"))
        ],
        [up("q", "a"), down("q", "b")],
        {OTHER_SPLIT: 1},
    ),
    (
        "HALOs pairwise feedback",
        [
            {
                "prompt": turns("q"),
                "output_A": [assistant("a")],
                "output_B": [assistant("b")],
                "label": label,
                "reward_A": 0.1,
                "reward_B": 0.2,
                "type": "pairwise_feedback",
            }
            for label in (0, 1)
        ],
        [*pair("q", "b", "a"), *pair("q", "a", "b")],
        {},
    ),
    (
        "OpenRLHF KTO",
        [{"instruction": "q", "response": "a", "score": 1}, {"instruction": "q", "response": "b", "score": 0}],
        [up("q", "a"), down("q", "b")],
        {},
    ),
    (
        "NeMo-Aligner KTO",
        [
            {"prompt": "q", "response": "a", "preference": "chosen"},
            {
                "prompt": "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nr\n<extra_id_1>Assistant\n",
                "response": "b",
                "preference": "rejected",
            },
            {
                "prompt": "<extra_id_0>System\n\n<extra_id_1>User\ns\n<extra_id_1>Assistant\n",
                "response": "c",
                "preference": "chosen",
            },
        ],
        [up("q", "a"), down("system: Be brief.", "r", "b"), up("s", "c")],
        {},
    ),
    (
        "NeMo-RL preferences",
        [
            {
                "context": turns("q"),
                "completions": [
                    {"rank": 1, "completion": [assistant("a")]},
                    {"rank": 0, "completion": [assistant("b")]},
                ],
            }
        ],
        pair("q", "b", "a"),
        {},
    ),
    (
        "chosen_response + rejected_response",
        [
            {
                "prompt": "q",
                "chosen_response": "a",
                "rejected_response": "b",
                "chosen_reward": 4.0,
                "rejected_reward": 1.0,
            }
        ],
        pair("q", "a", "b"),
        {},
    ),
    (
        "GPT-NeoX KTO",
        [{"messages": turns("q", "a"), "reward": 1.0}, {"messages": turns("r", "b"), "reward": -1.0}],
        [up("q", "a"), down("r", "b")],
        {},
    ),
    (
        "ms-swift rejected_response",
        [
            {"messages": [system("s"), *turns("q", "a")], "rejected_response": "b"},
            {"messages": turns("q", "c", "r", "d"), "rejected_response": "e"},
            {"messages": turns("q", "a"), "rejected_response": None},
        ],
        [*pair(["system: s", "q"], "a", "b"), *pair(["q", "c", "r"], "d", "e")],
        {EMPTY: 1},
    ),
    (
        "ms-swift rejected_messages",
        [{"messages": turns("q", "a"), "rejected_messages": turns("q", "b")}],
        pair("q", "a", "b"),
        {},
    ),
    (
        "ms-swift query, response and rejected_response",
        [
            {"system": "s", "query": "q", "response": "a", "rejected_response": "b", "history": [["p", "o"]]},
            {"system": None, "query": "r", "response": "c", "rejected_response": "d", "history": []},
        ],
        [*pair(["system: s", "p", "o", "q"], "a", "b"), *pair("r", "c", "d")],
        {},
    ),
    (
        "verl scored responses",
        [
            {"data_source": "d", "prompt": turns("q"), "ability": "m", "response": "a", "score": 1.0},
            {"data_source": "d", "prompt": turns("q"), "ability": "m", "response": "b", "score": 0.0},
        ],
        [up("q", "a"), down("q", "b")],
        {},
    ),
    (
        "BeaverTails",
        [
            {"prompt": "q", "response": "a", "category": {"x": False}, "is_safe": True},
            {"prompt": "q", "response": "b", "category": {"x": True}, "is_safe": False},
        ],
        [up("q", "a"), down("q", "b")],
        {},
    ),
    (
        "Nectar",
        [
            {
                "prompt": "\n\nHuman: q\n\nAssistant: ",
                "answers": [
                    {"answer": "a", "rank": 2.0},
                    {"answer": "b", "rank": 1.0},
                    {"answer": "c", "rank": 3.0},
                    {"answer": "d", "rank": 1.0},
                ],
            }
        ],
        [*pair("q", "b", "a"), *pair("q", "b", "c")],
        {TIE: 1},
    ),
    (
        "AlpacaFarm preferences",
        [
            {"instruction": "Add.", "input": "1 2", "output_1": "4", "output_2": "3", "preference": 2},
            {"instruction": "Greet.", "input": "", "output_1": "Hi", "output_2": "No", "preference": 1},
        ],
        [*pair("Add.\n1 2", "3", "4"), *pair("Greet.", "Hi", "No")],
        {},
    ),
    (
        "StackExchange pairs",
        [{"qid": 1, "question": "q", "response_j": "a", "response_k": "b"}],
        pair("q", "a", "b"),
        {},
    ),
    (
        "StackExchange preferences",
        [
            {
                "qid": 1,
                "question": "q",
                "answers": [
                    {"answer_id": 1, "pm_score": 2, "selected": False, "text": "a"},
                    {"answer_id": 2, "pm_score": 5, "selected": True, "text": "b"},
                    {"answer_id": 3, "pm_score": 5, "selected": False, "text": "c"},
                ],
            }
        ],
        pair("q", "c", "a"),
        {TIE: 1},
    ),
    (
        "NeMo-RL preferences",
        [
            {
                "context": turns("q", "a", "r"),
                "completions": [
                    {"rank": 1, "completion": [assistant("b")]},
                    {"rank": 0, "completion": [assistant("c")]},
                    {"rank": 0, "completion": [assistant("d")]},
                ],
            }
        ],
        pair(["q", "a", "r"], "c", "b"),
        {TIE: 1},
    ),
    (
        "torchtune preferences",
        [
            {"chosen_conversations": turns("q", "a"), "rejected_conversations": turns("q", "b")},
            {"chosen_conversations": turns("r", "c"), "rejected_conversations": turns("r", "d")},
        ],
        [*pair("q", "a", "b"), *pair("r", "c", "d")],
        {},
    ),
    (
        "two responses and the better one",
        [
            {"id": "1", "prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_b", "model_a": "m"},
            {"id": "2", "prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie", "model_a": "m"},
            {"id": "3", "prompt": "r", "response_a": "c", "response_b": "d", "winner": "model_a", "model_a": "m"},
        ],
        [*pair("q", "b", "a"), *pair("r", "c", "d")],
        {TIE: 1},
    ),
    (
        "two responses and the better one",
        [
            {"system": "s", "question": "q", "response_a": "a", "response_b": "b", "preference": "B"},
            {"system": "", "question": "q", "response_a": "a", "response_b": "b", "preference": "A"},
        ],
        [*pair(["system: s", "q"], "b", "a"), *pair("q", "a", "b")],
        {},
    ),
    (
        "ms-swift instruction, output and rejected_response",
        [{"system": "s", "instruction": "q", "input": "x", "output": "a", "rejected_response": "b"}],
        pair(["system: s", "q\nx"], "a", "b"),
        {},
    ),
    (
        "pairs with an input",
        [
            # The ratings are on a scale of 1 to 10, and both sides would be above 4 of 5.
            {
                "system": "s",
                "input": "q",
                "chosen": "a",
                "rejected": "b",
                "generations": ["b", "a"],
                "rating": [7.0, 9.0],
                "status": "swapped",
            },
            {
                "system": "",
                "input": "q",
                "chosen": "a",
                "rejected": "b",
                "generations": ["a", "b"],
                "rating": [9.0, 9.0],
                "status": "tie",
            },
        ],
        pair(["system: s", "q"], "a", "b"),
        {TIE: 1},
    ),
    (
        "OpenAssistant trees",
        [
            {
                "message_tree_id": "1",
                "tree_state": "ready_for_export",
                "prompt": {
                    **{"message_id": "1", "text": "q", "role": "prompter"},
                    "replies": [
                        {
                            **{"message_id": "2", "text": "a", "role": "assistant", "rank": 1},
                            "replies": [
                                {
                                    **{"message_id": "3", "text": "r", "role": "prompter"},
                                    "replies": [
                                        {"message_id": "4", "text": "c", "role": "assistant", "rank": 0, "replies": []},
                                        {"message_id": "5", "text": "d", "role": "assistant", "rank": 1, "replies": []},
                                    ],
                                }
                            ],
                        },
                        {"message_id": "6", "text": "b", "role": "assistant", "rank": 0, "replies": []},
                    ],
                },
            },
            {
                "message_tree_id": "2",
                "tree_state": "ready_for_export",
                "prompt": {"message_id": "7", "text": "s", "role": "prompter", "replies": []},
            },
        ],
        [*pair("q", "b", "a"), *pair(["q", "a", "r"], "c", "d")],
        {},
    ),
    (
        "PRISM utterances",
        [
            {**PRISM, "turn": 0, "within_turn_id": 0, "model_response": "a", "score": 90, "if_chosen": True},
            {**PRISM, "turn": 0, "within_turn_id": 1, "model_response": "b", "score": 11, "if_chosen": False},
            {**PRISM, "turn": 0, "within_turn_id": 2, "model_response": "c", "score": 50, "if_chosen": False},
            # The turns before it are in other records.
            {**PRISM, "turn": 1, "within_turn_id": 0, "model_response": "d", "score": 99, "if_chosen": True},
        ],
        [up("q", "a"), down("q", "b")],
        {"between up and down": 1, NOT_CHOSEN: 1},
    ),
    (
        "Prometheus feedback",
        [
            {**PROMETHEUS, "orig_response": "a", "orig_score": "5"},
            {**PROMETHEUS, "orig_response": "b", "orig_score": "1"},
            {**PROMETHEUS, "orig_response": "c", "orig_score": "3"},
        ],
        [up("q", "a"), down("q", "b")],
        {"between up and down": 1},
    ),
    (
        "Prometheus preferences",
        [{**PROMETHEUS, "orig_response_A": "a", "orig_response_B": "b", "orig_preference": "B"}],
        pair("q", "b", "a"),
        {},
    ),
    (
        "summarize_from_feedback, ratings",
        [
            {"info": {"id": "1", "post": "p"}, "summary": {"text": "a", "axes": {"overall": 6}}, "split": "train"},
            {"info": {"id": "2", "article": "q"}, "summary": {"text": "b", "axes": {"overall": 2}}, "split": "train"},
            {"info": {"id": "3", "post": "r"}, "summary": {"text": "c", "axes": {"overall": 4}}, "split": "train"},
        ],
        [up("p", "a"), down("q", "b")],
        {"between up and down": 1},
    ),
]


def name_of(value):
    return value if isinstance(value, str) else getattr(value, "__name__", "")


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
@pytest.mark.parametrize(("name", "records", "rows", "left_out"), DATA, ids=name_of)
def test_data_sets_are_recognised_in_every_container(tmp_path, container, name, records, rows, left_out):
    found, counts, feedback = read(container(tmp_path, records))
    assert feedback.mapping is not None
    assert feedback.mapping.name == name
    assert found == rows
    assert counts == left_out


# Formats that need no mapping: the keys say it
NATIVE = [
    ("axolotl: system and instruction", {"system": "s", "instruction": "q", "completion": "a", "label": True}),
    ("axolotl: system and question", {"system": "s", "question": "q", "completion": "a", "label": True}),
    ("ms-swift: query and response", {"system": "s", "query": "q", "response": "a", "history": [], "label": True}),
    ("ms-swift: messages", {"messages": [system("s"), *turns("q", "a")], "label": True}),
    ("LLaMA-Factory: alpaca", {"system": "s", "instruction": "q", "input": "", "output": "a", "kto_tag": True}),
    ("TRL: unpaired", {"prompt": [system("s"), user("q")], "completion": [assistant("a")], "label": True}),
    ("ms-swift: conversation", {"system": "s", "conversation": [{"human": "q", "assistant": "a"}], "label": True}),
    ("messages under another name", {"conversation": [system("s"), *turns("q", "a")], "label": True}),
    ("OpenRLHF: label", {"system_prompt": "s", "prompt": "q", "response": "a", "label": 1}),
]


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
@pytest.mark.parametrize(("name", "record"), NATIVE, ids=name_of)
def test_formats_of_trainers(tmp_path, container, name, record):
    rows, left_out, feedback = read(container(tmp_path, [record, {**record, "label": None, "kto_tag": None}]))
    assert name
    assert feedback.mapping is None
    assert rows == [up("system: s", "q", "a")]
    assert left_out == {UNRATED: 1}


def test_orca_pairs(tmp_path):
    records = [
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        {"system": "", "question": "r", "chosen": "c", "rejected": "c"},
    ]
    rows, left_out, _ = read(as_jsonl(tmp_path, records))
    assert rows == pair(["system: s", "q"], "a", "b")
    assert left_out == {SAME_ANSWERS: 1}


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("name", "word"), [("status", "tie"), ("winner", "Tie"), ("winner", "both_bad"), ("preference", "no preference")]
)
def test_a_pair_of_which_neither_is_better_is_left_out(tmp_path, container, name, word):
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b", name: value} for value in ("chosen", word)]
    rows, left_out, feedback = read(container(tmp_path, pairs))
    assert rows == pair("q", "a", "b")
    assert left_out == {TIE: 1}
    assert feedback.unused_columns() == []


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize("name", ["ratings", "scores", "rewards"])
def test_ratings_of_both_sides_in_an_object_must_fit(tmp_path, container, name):
    def record(chosen, rejected):
        return {"prompt": "q", "chosen": "a", "rejected": "b", name: {"chosen": chosen, "rejected": rejected}}

    rows, left_out, feedback = read(container(tmp_path, [record(5, 1), record(3, 3)]))
    assert rows == pair("q", "a", "b")
    assert left_out == {TIE: 1}
    assert feedback.unused_columns() == []
    assert f"'rejected' is rated above 'chosen' ({name}.rejected 5, {name}.chosen 1)" in refusal(
        container(tmp_path, [record(1, 5)])
    )


# Options count more than a format's keys


def test_another_label_of_a_format(tmp_path):
    records = next(records for name, records, _, _ in DATA if name == "HelpSteer")
    rows, _, _ = read(as_jsonl(tmp_path, records), label_field="coherence", up=">=4", down="<4")
    assert [label for _, label, _ in rows] == [True] * 4


def test_a_named_preset_replaces_the_recognised_one(tmp_path):
    records = next(records for name, records, _, _ in DATA if name.startswith("PKU"))
    rows, _, _ = read(as_jsonl(tmp_path, records), map="pku_saferlhf_safe")
    assert rows == [
        up("How?", "Like so."),
        down("How?", "No idea."),
        up("How?", "Like so."),
        up("How?", "No idea."),
    ]


def test_an_option_that_a_format_has_no_place_for(tmp_path):
    record = {**PKU, "better_response_id": 0, "completion": "c", "good": True}
    path = as_jsonl(tmp_path, [record])
    assert read(path)[0] == pair("How?", "Like so.", "No idea.")
    assert read(path, label_field="good")[0] == [up("How?", "c")]
    assert read(path, completion_field="response_1", label_field="good")[0] == [up("How?", "No idea.")]
    assert "--label-field" in refusal(path, ConfigError, map="pku_saferlhf", label_field="good")


@pytest.mark.parametrize(
    "options",
    [{"label_field": "quality"}, {"label_field": "nope"}, {"up": "B", "down": "A"}, {"rating_threshold": "4"}],
)
@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
def test_options_of_labels_on_pairs_are_refused(tmp_path, options, prompt):
    path = as_jsonl(tmp_path, [{prompt: "q", "chosen": "a", "rejected": "b", "quality": 0}] * 2)
    message = refusal(path, **options)
    assert "preference pairs, which have no label" in message
    assert all(f"--{name.replace('_', '-')}" in message for name in options)
    assert read(path)[0] == pair("q", "a", "b") * 2


def test_options_of_labels_apply_to_the_rows_beside_pairs(tmp_path):
    path = as_jsonl(
        tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "r", "answer": "c", "mark": 0}]
    )
    assert read(path, label_field="mark")[0] == [*pair("q", "a", "b"), down("r", "c")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "response_a": "a", "response_b": "b", "preferred": "B"},
        {
            "input": {"messages": turns("q")},
            "preferred_output": turns("q", "a")[1:],
            "non_preferred_output": turns("q", "b")[1:],
        },
        {"type": "pairwise_feedback", "prompt": "q", "output_A": "a", "output_B": "b", "label": 0},
        {**PKU, "better_response_id": 1},
    ],
)
@pytest.mark.parametrize("options", [{"up": "B", "down": "A"}, {"label_field": "preferred", "up": "B", "down": "A"}])
def test_options_of_labels_are_named_where_a_recognised_format_has_pairs(tmp_path, record, options):
    path = as_jsonl(tmp_path, [record])
    message = refusal(path, **options)
    assert "Remove --" in message
    assert "--up and --down" in message
    assert "none of the known formats" not in message
    assert len(read(path)[0]) == 2


def test_the_judged_turn_of_a_longer_conversation(tmp_path):
    """MT-bench judges the first turn and the second one apart, in conversations that hold both."""
    whole = {"conversation_a": turns("q", "a", "r", "b"), "conversation_b": turns("q", "c", "r", "d")}
    path = as_jsonl(tmp_path, [{**ARENA, **whole, "winner": "model_a", "turn": turn} for turn in (1, 2)])
    assert read(path)[0] == [*pair("q", "a", "c"), up("q", "a", "r", "b"), down("q", "c", "r", "d")]


def test_a_verdict_that_is_missing_is_no_tie(tmp_path):
    path = as_jsonl(tmp_path, [{**PKU, "better_response_id": 1}, {**PKU, "better_response_id": None}])
    assert read(path)[1] == {UNRATED: 1}


def test_a_verdict_that_is_neither_side_nor_a_tie_is_refused(tmp_path):
    record = {**ARENA, "winner": "left", "conversation_a": turns("q", "a"), "conversation_b": turns("q", "b")}
    message = refusal(as_jsonl(tmp_path, [record]))
    assert '"left"' in message
    assert "a_when" in message
    assert "--up" not in message


@pytest.mark.parametrize("name", ["winner", "preference", "choice", "preferred"])
def test_a_verdict_that_is_unknown_is_named_by_its_column(tmp_path, name):
    records = [{"prompt": "q", "response_a": "a", "response_b": "b", name: value} for value in (1, 2)]
    message = refusal(as_jsonl(tmp_path, records))
    assert f"f.jsonl:1: '{name}' is 1, which names neither answer. '{name}' has 1 (1 time), 2 (1 time)." in message
    assert "||" not in message


def test_a_label_that_is_unknown_is_named_by_its_column(tmp_path):
    (tmp_path / "m.yaml").write_text("prompt: q\ncompletion: a\nlabel: mark || grade\n", encoding="utf-8")
    records = [{"q": "q", "a": "a", "grade": "fine"}, {"q": "q", "a": "b", "grade": "poor"}]
    message = refusal(as_jsonl(tmp_path, records), map=str(tmp_path / "m.yaml"))
    assert "f.jsonl:1: 'grade' is \"fine\"" in message


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("column", "values", "failed"),
    [
        ("status", ["failed", "completed"], 1),
        ("finish_reason", ["length", "stop"], 1),
        ("error", ["timeout", None], 1),
        ("deleted", [True, False], 1),
        ("deleted", [False, False], 0),
        ("error", ["", None], 0),
        ("exception", ["Traceback", None], 1),
        ("error_message", ["timeout", "none"], 1),
        ("level", ["ERROR", "DEFAULT"], 1),
        ("status", ["draft", "submitted"], 1),
        ("state", ["ERROR", "OK"], 1),
        ("response_status", [500, 200], 1),
        ("response_status", [204, 200], 0),
        ("truncated", [True, False], 1),
        ("discarded", [True, None], 1),
        ("is_spam", [True, False], 1),
    ],
)
def test_records_of_answers_that_failed_are_counted(tmp_path, container, column, values, failed):
    path = container(tmp_path, [{**row, column: value} for row, value in zip(ROWS, values, strict=True)])
    rows, _, feedback = read(path)
    assert rows == [up("q", "a"), down("r", "b")]
    notes = [note for note in feedback.notes() if f"'{column}' suggests that the answer failed" in note]
    assert len(notes) == failed
    assert all(": 1 (first: f." in note for note in notes)


# dataset_info.json of LLaMA-Factory


def beside(path, entry):
    text = json.dumps({"other": {"file_name": "other.json"}, "mine": {"file_name": path.name, **entry}})
    (path.parent / "dataset_info.json").write_text(text, encoding="utf-8")
    return path


def test_columns_of_dataset_info(tmp_path):
    path = as_jsonl(
        tmp_path,
        [
            {"question": "q", "context": "c", "answer": "a", "is_good": True, "input": "not read"},
            {"question": "r", "context": "", "answer": "b", "is_good": False, "input": "not read"},
        ],
    )
    columns = {"prompt": "question", "query": "context", "response": "answer", "kto_tag": "is_good"}
    rows, _, feedback = read(beside(path, {"columns": columns}))
    assert rows == [up("q\nc", "a"), down("r", "b")]
    assert "dataset_info.json" in feedback.why
    assert feedback.unused_columns() == []
    # Options count more.
    assert read(path, prompt_field="context", completion_field="answer", label_field="is_good")[0][0] == up("c", "a")


def test_tags_of_dataset_info(tmp_path):
    records = [
        {"talk": [{"who": "me", "says": "q"}, {"who": "it", "says": answer}], "rule": "s", "good": good}
        for answer, good in (("a", 1), ("b", 0))
    ]
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"}
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rule", "kto_tag": "good"},
        "tags": tags,
    }
    for container in (as_jsonl, as_json, as_parquet, as_csv):
        rows, _, _ = read(beside(container(tmp_path, records), entry))
        assert rows == [up("system: s", "q", "a"), down("system: s", "q", "b")]


def test_ranking_of_dataset_info(tmp_path):
    record = {
        "conversations": [{"from": "human", "value": "q"}],
        "good": {"from": "gpt", "value": "a"},
        "bad": {"from": "gpt", "value": "b"},
    }
    entry = {"formatting": "sharegpt", "ranking": True, "columns": {"chosen": "good", "rejected": "bad"}}
    assert read(beside(as_json(tmp_path, [record, record]), entry))[0] == pair("q", "a", "b") * 2


def test_columns_that_dataset_info_names_are_used(tmp_path):
    record = {"conv": [{"from": "human", "value": "q"}], "c": "a", "r": "b", "sy": "s", "note": "x"}
    columns = {"messages": "conv", "chosen": "c", "rejected": "r", "system": "sy"}
    path = beside(as_json(tmp_path, [record, record]), {"formatting": "sharegpt", "ranking": True, "columns": columns})
    assert read(path)[2].unused_columns() == ["note"]


def test_mistakes_in_dataset_info_name_it(tmp_path):
    path = as_jsonl(tmp_path, [{"prompt": "q", "completion": "a", "label": True}])
    assert "columns" in refusal(beside(path, {"columns": {"promt": "prompt"}}), ConfigError)
    assert "formatting" in refusal(beside(path, {"formatting": "x"}), ConfigError)
    (tmp_path / "dataset_info.json").write_text("{", encoding="utf-8")
    assert read(path)[0] == [up("q", "a")]


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data_set(tmp_path):
    """A folder without anything else in it."""
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


SWAPPED = [
    {"answer": "q", "question": "a", "kto_tag": True},
    {"answer": "r", "question": "b", "kto_tag": False},
]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("container", ["as_jsonl", "as_json", "as_csv", "as_parquet", "as_packed"])
def test_dataset_info_counts_for_a_folder_as_for_its_file(data_set, container):
    entry = {"columns": {"prompt": "answer", "response": "question", "kto_tag": "kto_tag"}}
    path = beside(globals()[container](data_set, SWAPPED), entry)
    expected = [up("q", "a"), down("r", "b")]
    assert read(path)[0] == expected
    rows, _, feedback = read(data_set)
    assert rows == expected
    assert feedback.why == "dataset_info.json: mine"
    assert feedback.unused_columns() == []


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["sub/f.jsonl", "sub", "sub/"])
def test_an_entry_of_dataset_info_names_a_file_below_it_or_its_folder(data_set, name):
    folder = data_set / "sub"
    folder.mkdir()
    path = as_jsonl(folder, SWAPPED)
    entry = {"file_name": name, "columns": {"prompt": "answer", "response": "question", "kto_tag": "kto_tag"}}
    (data_set / "dataset_info.json").write_text(json.dumps({"mine": entry}), encoding="utf-8")
    for data in (path, folder, data_set):
        assert read(data)[0] == [up("q", "a"), down("r", "b")]


@pytest.mark.usefixtures("datasets_cache")
def test_each_file_of_a_folder_has_its_own_entry_of_dataset_info(data_set):
    for name, prompt, response in (("one", "answer", "question"), ("two", "x", "y")):
        good, bad = SWAPPED
        rows = [{prompt: one["answer"], response: one["question"], "kto_tag": one["kto_tag"]} for one in (good, bad)]
        (data_set / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (data_set / "three.json").write_text(json.dumps(ROWS), encoding="utf-8")
    table = {
        name: {"file_name": f"{name}.json", "columns": {"prompt": prompt, "response": response, "kto_tag": "kto_tag"}}
        for name, prompt, response in (("one", "answer", "question"), ("two", "x", "y"))
    }
    (data_set / "dataset_info.json").write_text(json.dumps(table), encoding="utf-8")
    assert read(data_set)[0] == [up("q", "a"), down("r", "b")] * 3


# Splits


ROWS = [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "r", "completion": "b", "label": False}]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("folder", ["data", "."])
@pytest.mark.parametrize("readme", [True, False])
@pytest.mark.parametrize("kind", [as_parquet, as_jsonl], ids=name_of)
def test_splits_of_a_folder_are_asked_for(tmp_path, folder, readme, kind):
    root = tmp_path / "set"
    (root / folder).mkdir(parents=True)
    for split in ("train_prefs", "train_sft", "test_prefs", "train_gen"):
        path = kind(tmp_path, [{**row, "prompt": f"{split} {row['prompt']}"} for row in ROWS])
        path.rename(root / folder / f"{split}-00000-of-00001{path.suffix}")
    if readme:
        lines = [f"  - split: {one}\n    path: {folder}/{one}-*" for one in ("train_prefs", "train_sft", "test_prefs")]
        text = "\n".join(["---", "configs:", "- config_name: default", "  data_files:", *lines, "---", ""])
        (root / "README.md").write_text(text, encoding="utf-8")
    message = refusal(root)
    assert "--split train_prefs" in message
    assert "train_sft" in message
    for split in ("train_prefs", "train_sft", "test_prefs"):
        assert read(root, split=split)[0] == [up(f"{split} q", "a"), down(f"{split} r", "b")]
    assert "train_prefs" in refusal(root, split="validation")


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("names", "read_names"),
    [
        (["train.jsonl", "test.jsonl"], ["train"]),
        (["train-1.jsonl", "train-2.jsonl"], ["train-1", "train-2"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["train-00000", "train-00001"]),
        (["2026-01-01.jsonl", "2026-01-02.jsonl"], ["2026-01-01", "2026-01-02"]),
        (["train_prefs.jsonl", "test_prefs.jsonl"], ["train_prefs"]),
        (["train-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl"], ["train-00000"]),
    ],
)
def test_files_of_one_split_are_read_together(tmp_path, names, read_names):
    root = tmp_path / "set"
    root.mkdir()
    for name in names:
        begin = name.removesuffix(".jsonl").split("-of")[0]
        as_jsonl(tmp_path, [{**row, "prompt": begin} for row in ROWS]).rename(root / name)
    assert [texts[0] for texts, _, _ in read(root)[0][::2]] == read_names


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("names", [["train_a.csv", "train_b.csv"], ["train_prefs/0.csv", "train_sft/0.csv"]])
def test_names_that_differ_after_train_are_asked_about(tmp_path, names):
    root = tmp_path / "set"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        as_csv(tmp_path, ROWS).rename(root / name)
    assert "--split train_" in refusal(root)


def test_splits_of_saved_data(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train_prefs=one, train_sft=one.select([0])).save_to_disk(tmp_path / "saved")
    assert "--split train_prefs" in refusal(tmp_path / "saved")
    assert len(read(tmp_path / "saved", split="train_sft")[0]) == 1


def test_splits_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    splits = {"train_sft": ROWS[:1], "train_prefs": ROWS}

    def load_dataset(name, *, split):
        assert name == "owner/name"
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _name: list(splits))
    assert "--split train_prefs" in refusal("owner/name")
    assert len(read("owner/name", split="train_prefs")[0]) == 2


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
def test_a_split_column_is_followed(tmp_path, container):
    records = [{**row, "split": split} for row in ROWS for split in ("train", "test", "Train")]
    path = container(tmp_path, records)
    rows, left_out, _ = read(path)
    assert rows == [up("q", "a")] * 2 + [down("r", "b")] * 2
    assert left_out == {OTHER_SPLIT: 2}
    assert len(read(path, split="all")[0]) == 6
    if path.is_file():
        assert len(read(path, split="test")[0]) == 2
        message = refusal(path, split="dev")
        assert '"test" (2 times)' in message
        assert "--split train" in message


@pytest.mark.parametrize("container", [as_jsonl, as_json, as_csv, as_parquet], ids=name_of)
def test_a_split_of_a_file_without_splits_is_refused(tmp_path, container):
    path = container(tmp_path, ROWS)
    message = refusal(path, split="test")
    assert 'no split "test"' in message
    assert "Remove --split" in message
    assert len(read(path)[0]) == len(read(path, split="all")[0]) == 2


def test_the_median_is_that_of_the_split(tmp_path):
    ratings = [("train", 1), ("train", 2), ("train", 3), ("test", 9), ("test", 9), ("test", 9)]
    records = [{"prompt": "q", "completion": "a", "rating": rating, "split": split} for split, rating in ratings]
    rows, _, _ = read(as_jsonl(tmp_path, records), rating_threshold="median")
    assert [label for _, label, _ in rows] == [False, True, True]
    records = next(records for name, records, _, _ in DATA if name == "HelpSteer")
    rows, _, _ = read(as_jsonl(tmp_path, records), rating_threshold="median", label_field="correctness")
    assert [label for _, label, _ in rows] == [True, False, True, True]


# Documents of records


@pytest.mark.parametrize("key", ["data", "results", "traces", "items"])
def test_one_list_of_records_in_an_object(tmp_path, key):
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"page": 1, "tags": ["x"], key: ROWS}), encoding="utf-8")
    rows, _, feedback = read(path)
    assert rows == [up("q", "a"), down("r", "b")]
    assert feedback.notes() == [f'f.json:1 is one JSON object; its 2 records were read under "{key}".']
    (path).write_text(json.dumps({"status": "ok", "result": {key: ROWS}}), encoding="utf-8")
    assert read(path)[0] == rows
    assert read(path, limit=1)[0] == rows[:1]


def test_records_of_a_document_are_named(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(
        json.dumps({"data": [*ROWS, {"prompt": "s", "completion": "c", "label": "so so"}]}), encoding="utf-8"
    )
    assert "f.json:1 (record 3)" in refusal(path)


def test_two_lists_of_records_are_ambiguous(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"good": ROWS, "bad": ROWS}), encoding="utf-8")
    message = refusal(path)
    assert '"good" (2)' in message
    assert '"bad" (2)' in message


def test_an_object_that_is_a_record_is_not_opened(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"messages": turns("q", "a"), "label": True}, indent=1), encoding="utf-8")
    rows, _, feedback = read(path)
    assert rows == [up("q", "a")]
    assert feedback.found.notes == []


COLUMNS = {name: {str(number): row[name] for number, row in enumerate(ROWS)} for name in ROWS[0]}
TABLES = {
    "viewer": {
        "features": [{"name": "prompt"}],
        "rows": [{"row_idx": 0, "row": row} for row in ROWS],
        "partial": False,
    },
    "columns": COLUMNS,
    "index": {str(number): row for number, row in enumerate(ROWS)},
    "split": {"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]},
    "table": {"schema": {"fields": [{"name": "index"}]}, "data": [{"index": 0, **row} for row in ROWS]},
}


@pytest.mark.parametrize("orient", TABLES)
def test_tables_as_pandas_writes_them(tmp_path, orient):
    path = tmp_path / "f.json"
    path.write_text(json.dumps(TABLES[orient]), encoding="utf-8")
    assert read(path)[0] == [up("q", "a"), down("r", "b")]


def test_tables_of_conversations(tmp_path):
    table = {"prompt": {"0": turns("q")}, "completion": {"0": [assistant("a")]}, "label": {"0": True}}
    path = tmp_path / "f.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    assert read(path)[0] == [up("q", "a")]


def test_a_table_of_rows_of_other_lengths_is_refused(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"columns": ["prompt", "label"], "data": [["q", True], ["r"]]}), encoding="utf-8")
    assert "record 2" in refusal(path)


# Cells of tables


@pytest.mark.parametrize("word", ["NaN", "nan", "None", "null", "<NA>", r"\N", "(null)"])
@pytest.mark.parametrize("container", [as_csv, as_jsonl, as_parquet], ids=name_of)
def test_names_of_missing_values_are_counted(tmp_path, container, word):
    _, _, feedback = read(container(tmp_path, [*ROWS, {"prompt": "s", "completion": word, "label": True}][1:]))
    (note,) = feedback.notes()
    assert ": 1 (first: " in note
    assert "f." in note


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_a_table_with_a_column_of_judged_messages_only(tmp_path, column):
    records = [{column: [user("q"), {**assistant("a"), "label": good}]} for good in (True, False)]
    assert read(as_csv(tmp_path, records))[0] == [up("q", "a"), down("q", "a")]


@pytest.mark.parametrize("blank", [";;", ";", " ; ;\t", ";;;;;"])
@pytest.mark.parametrize("header", ["prompt;completion;label", "user_query;ai_response;feedback_rating"])
def test_empty_rows_of_a_spreadsheet_are_left_out(tmp_path, blank, header):
    path = tmp_path / "f.csv"
    path.write_text(f"{header}\nq;a;up\n{blank}\nr;b;down\n{blank}\n{blank}\n", encoding="utf-8")
    assert read(path)[:2] == ([up("q", "a"), down("r", "b")], {"empty record": 3})


@pytest.mark.parametrize("container", [as_jsonl, as_json, as_parquet], ids=name_of)
def test_records_whose_values_are_all_null_are_left_out(tmp_path, container):
    records = [*ROWS, dict.fromkeys(ROWS[0]), {**dict.fromkeys(ROWS[0], ""), "label": None}]
    assert read(container(tmp_path, records))[:2] == ([up("q", "a"), down("r", "b")], {"empty record": 2})


@pytest.mark.parametrize("word", ["nan", "None", "N/A", "#NAME?"])
@pytest.mark.parametrize("container", [as_csv, as_jsonl, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "s", "system": "W", "completion": "c", "label": True}, up("system: W", "s", "c")),
        ({"prompt": "s", "system_prompt": "W", "completion": "c", "label": True}, up("system: W", "s", "c")),
        ({"instruction": "s", "input": "W", "output": "c", "label": True}, up("s\nW", "c")),
        ({"instruction": "s", "system": "W", "output": "c", "label": True}, up("system: W", "s", "c")),
        ({"messages": turns("W", "b", "s", "c"), "label": True}, up("W", "b", "s", "c")),
        ({"prompt": "s", "history": [["a", "W"]], "completion": "c", "label": True}, up("a", "W", "s", "c")),
    ],
)
def test_names_of_missing_values_in_other_texts_are_counted(tmp_path, container, word, record, expected):
    written = json.loads(json.dumps(record).replace('"W"', json.dumps(word)))
    rows, _, feedback = read(container(tmp_path, [written]))
    texts, label, paired = expected
    assert rows == [([text.replace("W", word) for text in texts], label, paired)]
    assert [note for note in feedback.notes() if "missing values: 1 (first: f." in note]


@pytest.mark.parametrize("container", [as_csv, as_jsonl, as_parquet], ids=name_of)
@pytest.mark.parametrize("column", ["prompt", "completion", "messages", "conversations", "chosen"])
def test_messages_as_python_prints_them_are_refused(tmp_path, container, column):
    record = {"prompt": "q", "completion": "a", "label": True}
    if column in ("messages", "conversations"):
        record = {"label": True}
    if column == "chosen":
        record = {"prompt": "q", "rejected": "b"}
    record[column] = str(turns("q", "a"))
    message = refusal(container(tmp_path, [record]))
    assert "json.dumps" in message
    assert column in message


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("names", "outside"), [(["dev", "main"], "main.jsonl"), (["test_2024", "prod_2024"], "prod_2024.jsonl")]
)
def test_files_that_are_in_no_split_are_named(data_set, tmp_path, names, outside):
    for name in names:
        as_jsonl(tmp_path, ROWS).rename(data_set / f"{name}.jsonl")
    message = refusal(data_set)
    assert outside in message
    assert "pass it as --data, or rename it to train.jsonl" in message


@pytest.mark.usefixtures("datasets_cache")
def test_the_configurations_of_a_folder_are_named(data_set, tmp_path):
    lines = []
    for name in ("one", "two"):
        (data_set / name).mkdir()
        as_jsonl(tmp_path, ROWS).rename(data_set / name / "x.jsonl")
        lines.append(f"- config_name: {name}\n  data_files: {name}/*.jsonl")
    (data_set / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]), encoding="utf-8")
    message = refusal(data_set)
    assert '["one", "two"]' in message
    assert "Pass the folder or the file of one of them." in message
    assert read(data_set / "one")[0] == [up("q", "a"), down("r", "b")]


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_of_files_with_different_keys(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    as_jsonl(tmp_path, ROWS).rename(root / "a.jsonl")
    as_jsonl(
        tmp_path, [{"messages": turns("s", "c"), "label": None}, {"messages": turns("t", "d"), "label": 0}]
    ).rename(root / "b.jsonl")
    rows, left_out, _ = read(root)
    assert rows == [up("q", "a"), down("r", "b"), down("t", "d")]
    assert left_out == {UNRATED: 1}


@pytest.mark.parametrize(
    ("record", "part"),
    [
        *[
            ({side: text}, "media (data:image/..., @@@langfuseMedia:...): 1 (first: f.jsonl:2)")
            for side, text in (
                ("prompt", "<image>\nWhat?"),
                ("prompt", "![](data:image/png;base64,AAAA) What?"),
                ("prompt", [user("What? @@@langfuseMedia:type=image/jpeg|id=x|source=base64@@@")]),
                ("completion", "Here: <img src='data:image/svg+xml;base64,AAAA'>"),
                ("completion", "@@@langfuseMedia:type=audio/wav|id=x|source=bytes@@@"),
            )
        ],
        (
            {"completion": '[{"speaker": "me", "msg": "a"}]'},
            "looks like messages but is scored as text: 1 (first: f.jsonl:2)",
        ),
        ({"prompt": [{"role": "critic", "content": "a"}]}, "unknown roles of messages: critic in 1 (first: f.jsonl:2)"),
        ({"prompt": [{"role": "a\x1b[2J\ud7fc", "content": "a"}]}, r"unknown roles of messages: a\x1b[2J\ud7fc in 1"),
        (
            {"prompt": "[INST] q [/INST]"},
            "turn marks of a chat template that is not the tokenizer's: 1 (first: f.jsonl:2)",
        ),
        ({"prompt": "User: q\nAssistant:"}, "turn marks of a chat template that is not the tokenizer's: 1"),
        ({"prompt": "system\nYou are Qwen.\nuser\n1?\nassistant\n"}, "turn marks of a chat template"),
        ({"prompt": "system: Be.\nuser: 1?\nassistant: one\nuser: 2?"}, "turn marks of a chat template"),
        ({"prompt": [user("<start_of_turn>user\n1?<end_of_turn>\n")]}, "turn marks of a chat template"),
        ({"prompt": "USER: 1? ASSISTANT:"}, "turn marks of a chat template"),
        ({"prompt": "A chat. USER: 1? ASSISTANT: one</s>USER: 2? ASSISTANT:"}, "turn marks of a chat template"),
        (
            {
                "prompt": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>1?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
            },
            "turn marks of a chat template",
        ),
        ({"prompt": "<|start|>user<|message|>1?<|end|><|start|>assistant"}, "turn marks of a chat template"),
        (
            {"completion": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4"},
            "marks of further turns or channels: 1 (first: f.jsonl:2)",
        ),
        ({"completion": "4\n\nHuman: 5?\n\nAssistant: 5"}, "marks of further turns or channels: 1 (first: f.jsonl:2)"),
        ({"completion": "4<|im_start|>user\n5?"}, "marks of further turns or channels: 1 (first: f.jsonl:2)"),
        (
            {"prompt": [user("a"), {"role": "assistant", "content": "Sorry", "status": "error"}, user("b")]},
            "a message that failed in the prompt ('status'): 1 (first: f.jsonl:2)",
        ),
        (
            {"prompt": "What is the capital of Peru?", "completion": "What is the capital of Peru?\nLima"},
            "begins with the whole prompt: 1 (first: f.jsonl:2)",
        ),
    ],
)
def test_rows_that_are_probably_misread_are_named(tmp_path, record, part):
    good = {"prompt": "p", "completion": '{"a": 1}', "label": True}
    config = PrecomputeConfig(model="m", data=str(as_jsonl(tmp_path, [good, {**good, **record}])))
    feedback = Feedback(config, has_template=True)
    for row in feedback.rows():
        feedback.keep(row)
    (note,) = feedback.notes()
    assert part in note


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What do USER and ASSISTANT: mean?"},
        {"prompt": "ASSISTANT: is written before USER: in it"},
        {"completion": "Assistant: yes\n\nHuman: no"},
        {"completion": "if a <|b|> c, ### Response: [/INST]"},
        {"prompt": [user("a"), {"role": "assistant", "content": "x", "status": "finished"}, user("b")]},
    ],
)
def test_rows_that_only_resemble_these_are_not_named(tmp_path, record):
    good = {"prompt": "p", "completion": "c", "label": True}
    feedback = Feedback(
        PrecomputeConfig(model="m", data=str(as_jsonl(tmp_path, [{**good, **record}]))), has_template=True
    )
    for row in feedback.rows():
        feedback.keep(row)
    assert feedback.notes() == []


def test_two_messages_of_one_id_are_named(tmp_path):
    turns = [
        {"id": "q", "role": "user", "content": "a"},
        {"id": "q", "role": "user", "content": "b", "parent": "q"},
        {"id": "r", "role": "assistant", "content": "c", "parent": "q", "vote": 1},
    ]
    mapping = tmp_path / "m.yaml"
    mapping.write_text("turns: {messages: turns, id: id, parent: parent, role: role, text: content, label: vote}\n")
    message = refusal(as_jsonl(tmp_path, [{"turns": turns}]), map=str(mapping))
    assert '2 messages have the id "q"' in message


def test_a_mapping_that_is_not_there_lists_the_formats(tmp_path):
    path = as_jsonl(tmp_path, [{"prompt": "p", "completion": "c", "label": True}])
    message = refusal(path, ConfigError, map="nofile.yaml")
    assert "langfuse" in message
    assert "lora" not in message


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"prompt": "p", "completion": "c", "label": True, "rating": 5}, {"rating"}),
        ({"prompt": "p", "completion": "c", "label": True, "input": "x", "messages": []}, {"input", "messages"}),
        ({"instruction": "p", "input": "x", "output": "c", "label": True, "history": []}, set()),
        ({"messages": turns("p", "c"), "label": True, "output": "c", "system": "s"}, {"output"}),
        ({"prompt": "p", "chosen": "c", "rejected": "d", "output": "x"}, {"output"}),
    ],
)
def test_columns_of_other_formats_are_unused(tmp_path, record, unused):
    _, _, feedback = read(as_jsonl(tmp_path, [record]))
    assert set(feedback.unused_columns()) == unused


def test_a_rating_that_is_compared_is_used_in_place_of_the_label(tmp_path):
    record = {"prompt": "p", "completion": "c", "label": False, "rating": 5}
    rows, _, feedback = read(as_jsonl(tmp_path, [record]), up=">=4", down="<=2")
    assert rows == [(["p", "c"], True, False)]
    assert set(feedback.unused_columns()) == {"label"}


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet])
@pytest.mark.parametrize("names", [("chosen_avg_rating", "rejected_avg_rating"), ("chosen_reward", "rejected_reward")])
def test_ratings_beside_named_sides_of_a_pair(tmp_path, container, names):
    record = {"prompt": "q", "chosen_response": "a", "rejected_response": "b"}
    rated = [{**record, **dict(zip(names, ratings, strict=True))} for ratings in ((4, 2), (3, 3), (1, 2))]
    rows, left_out, feedback = read(container(tmp_path, rated[:2]))
    assert rows == pair("q", "a", "b")
    assert left_out == {TIE: 1}
    assert feedback.unused_columns() == []
    assert f"'rejected' is rated above 'chosen' ({names[1]} 2, {names[0]} 1)" in refusal(container(tmp_path, rated))


def test_ratings_off_the_scale_of_a_format(tmp_path):
    records = [
        {"instruction": "q", "generations": ["a", "b"], "ratings": ratings} for ratings in ([5, 3], [9, 2], [7, 4])
    ]
    message = refusal(as_jsonl(tmp_path, records))
    assert "9, which is not on the scale from 1 to 5" in message
    assert "--up '>=7' --down '<=4'" in message
    wrong = [{"instruction": "q", "generations": ["a", "b"], "ratings": [5, one]} for one in (1, 45)]
    message = refusal(as_jsonl(tmp_path, wrong))
    assert (
        "45, which is not on the scale from 1 to 5. Correct 45 (1 time): the other ratings are on the scale" in message
    )
    assert "--up" not in message
    # All ratings of a record are counted.
    assert "9 (1 time), 2 (1 time). If that is" in refusal(as_jsonl(tmp_path, records[1:2]))
    rows, left_out, _ = read(as_jsonl(tmp_path, records), up=">=7", down="<=4")
    assert rows == [down("q", "b"), up("q", "a"), down("q", "b"), up("q", "a"), down("q", "b")]
    assert left_out == {"between up and down": 1}


def test_attributes_like_those_of_helpsteer_on_another_scale(tmp_path):
    """3 of 5 is no good rating."""
    ratings = {"response": ["a", "b", "c"], "helpfulness": [5, 3, 1]}
    columns = zip(*ratings.values(), strict=True)
    records = [
        {"prompt": "q", **dict(zip(ratings, one, strict=True)), "correctness": 4, "coherence": 4} for one in columns
    ]
    message = refusal(as_csv(tmp_path, records))
    assert "not on the scale from 0 to 4" in message
    assert "--up '>=4' --down '<=2'" in message
    rows, left_out, _ = read(as_csv(tmp_path, records), up=">=4", down="<=2")
    assert rows == [up("q", "a"), down("q", "c")]
    assert left_out == {"between up and down": 1}


def test_conversations_beside_an_input_are_no_text(tmp_path):
    record = {"input": "about", "chosen": turns("q", "a"), "rejected": turns("q", "b")}
    rows, _, feedback = read(as_jsonl(tmp_path, [record]))
    assert rows == pair("q", "a", "b")
    assert feedback.mapping is None


def test_a_pair_of_distilabel_is_read_as_a_pair(tmp_path):
    record = {
        **{"instruction": "q", "generations": ["a", "b", "c"], "ratings": [5, 1, 4], "prompt": "q"},
        **{"chosen": turns("q", "a"), "rejected": turns("q", "b"), "chosen_rating": 5, "rejected_rating": 1},
    }
    assert read(as_jsonl(tmp_path, [record]))[0] == pair("q", "a", "b")


def test_the_turn_marks_of_nemo_aligner(tmp_path):
    prompt = "<extra_id_0>System\ns\n<extra_id_1>User\nq\n<extra_id_1>Assistant\n"
    record = {"prompt": prompt, "chosen_response": "a\n<extra_id_1>", "rejected_response": "b\n<extra_id_1>"}
    assert read(as_jsonl(tmp_path, [record]))[0] == pair(["system: s", "q"], "a", "b")


# Labels of single messages


def judged(**labels):
    """Two answers in one conversation; labels: of each answer, by key."""
    said = turns("q", "a", "r", "b")
    for key, values in labels.items():
        said[1][key], said[3][key] = values
    return {"id": 1, "messages": said}


BOTH = [up("q", "a"), down("q", "a", "r", "b")]


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
@pytest.mark.parametrize(
    "labels",
    [
        {"label": (True, False)},
        {"feedback": ("thumbs_up", "thumbs_down")},
        {"feedback": ({"rating": "up", "comment": "x"}, {"rating": "down", "comment": None})},
        {"thumbs": ("up", "down")},
        {"vote": (1, 0)},
        {"reaction": ("👍", "👎")},
        {"score": (1, 0)},
    ],
    ids=str,
)
def test_labels_of_messages_in_every_container(tmp_path, container, labels):
    records = [judged(**labels), {"id": 2, "messages": turns("q", "a")}]
    rows, left_out, _ = read(container(tmp_path, records))
    assert rows == BOTH
    assert left_out == {UNRATED: 1}


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
def test_a_list_of_labels_in_every_container(tmp_path, container):
    records = [{**judged(), "labels": [None, False]}, {"id": 2, "messages": turns("q", "a"), "labels": [True]}]
    assert read(container(tmp_path, records))[0] == [BOTH[1], up("q", "a")]


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
def test_a_label_of_messages_that_is_found_is_proposed(tmp_path, container):
    records = [judged(metadata=({"liked": "yes"}, {"liked": "no"})), {"id": 2, "messages": turns("q", "a")}]
    message = refusal(container(tmp_path, records))
    assert "pass --label-field 'metadata.liked'" in message
    assert read(container(tmp_path, records), label_field="metadata.liked")[0] == BOTH


def test_ratings_of_messages_are_counted_together(tmp_path):
    path = as_jsonl(tmp_path, [judged(rating=(5, 1))])
    assert "5 (1 time), 1 (1 time)" in refusal(path)
    assert "--label-field rating --up '>=4' --down '<=2'" in refusal(path)
    assert read(path, label_field="rating", up=">=4", down="<=2")[0] == BOTH


def test_labels_of_a_record_and_of_its_messages(tmp_path):
    path = as_jsonl(tmp_path, [{**judged(vote=("up", "down")), "label": True}])
    assert "--label-field label or --label-field vote" in refusal(path)
    assert read(path, label_field="label")[0] == [up("q", "a", "r", "b")]
    assert read(path, label_field="vote")[0] == BOTH
    # A score beside a label may be anything.
    path = as_jsonl(tmp_path, [{**judged(score=(0.2, 0.7)), "label": True}])
    assert read(path)[0] == [up("q", "a", "r", "b")]


def test_two_labels_in_one_object_of_a_message(tmp_path):
    path = as_jsonl(tmp_path, [judged(feedback=({"rating": "up", "score": 3}, None))])
    assert "--label-field feedback.rating" in refusal(path)
    assert read(path, label_field="feedback.rating")[0] == [up("q", "a")]


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet])
def test_a_list_of_labels_may_be_that_of_raters(tmp_path, container):
    path = container(tmp_path, [{**judged(), "label": [True, True]}, {**judged(), "label": [False, False]}])
    assert "Call the column 'labels'" in refusal(path)


def test_sides_that_name_other_columns_are_refused(tmp_path):
    records = [
        {"prompt": "q", "answer_a": "a", "answer_b": "b", "chosen": "A", "rejected": "B"},
        {"prompt": "r", "answer_a": "c", "answer_b": "d", "chosen": "B", "rejected": "A"},
    ]
    for container in (as_jsonl, as_csv, as_parquet):
        message = refusal(container(tmp_path, records))
        assert "seem to name the columns 'answer_a' and 'answer_b'" in message
    line = message[message.index("`pair") :].split("`")[1]
    (tmp_path / "m.yaml").write_text(f"prompt: prompt\n{line}\n", encoding="utf-8")
    rows, _, _ = read(as_jsonl(tmp_path, records), map=str(tmp_path / "m.yaml"))
    assert rows == [*pair("q", "a", "b"), *pair("r", "d", "c")]
    # Short answers beside other columns are answers.
    short = {"prompt": "q", "chosen": "A", "rejected": "B", "option_a": "x", "id": "b"}
    assert read(as_jsonl(tmp_path, [short]))[0] == pair("q", "A", "B")


def test_a_column_of_rejected_answers_without_a_known_partner(tmp_path):
    records = [{"instruction": "q", "reply": "a", "rejected_reply": "b"}]
    path = as_csv(tmp_path, [{"instruction": "q", "output": "a", "rejected_output": "b"}])
    message = refusal(path)
    lines = [part for part in message.split("`") if part.startswith(("prompt:", "pair:"))]
    (tmp_path / "m.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert read(path, map=str(tmp_path / "m.yaml"))[0] == pair("q", "a", "b")
    assert "--map FILE" in refusal(as_jsonl(tmp_path, records))


def test_texts_of_joined_messages_are_used(tmp_path):
    messages = [
        {**OASST, "message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "rank": None},
        {**OASST, "message_id": "2", "parent_id": "1", "text": "a", "role": "assistant", "rank": 0},
        {**OASST, "message_id": "3", "parent_id": "1", "text": "b", "role": "assistant", "rank": 1},
    ]
    rows, _, feedback = read(as_jsonl(tmp_path, messages))
    assert rows == pair("q", "a", "b")
    assert feedback.unused_columns() == ["lang"]


@pytest.mark.parametrize("single", [False, True])
def test_columns_of_a_json_object(tmp_path, single):
    """Read what `json.dump(dataset.to_dict(), handle)` writes."""
    asked, said = [[user("q")], [user("r")]], [[assistant("a")], [assistant("b")]]
    table = {"prompt": ["q", "r"], "completion": ["a", "b"]} if single else {"prompt": asked, "completion": said}
    (tmp_path / "f.json").write_text(json.dumps({**table, "label": [True, False]}), encoding="utf-8")
    assert read(tmp_path / "f.json")[0] == [up("q", "a"), down("r", "b")]


def test_lists_of_messages_are_no_columns(tmp_path):
    record = {"chosen": turns("q", "a"), "rejected": turns("q", "b")}
    (tmp_path / "f.json").write_text(json.dumps(record), encoding="utf-8")
    assert read(tmp_path / "f.json")[0] == pair("q", "a", "b")


@pytest.mark.parametrize("cell", ["['q']", "['it is' 'q']", "[\"it's\" 'q']", "['q', \"it's\"]"])
def test_lists_of_texts_as_python_prints_them_are_refused(tmp_path, cell):
    record = {**ARENA_55K, "prompt": cell, "response_a": cell, "response_b": "b", **dict.fromkeys(WINNERS, 0)}
    assert "not JSON" in refusal(as_csv(tmp_path, [{**record, WINNERS[0]: 1}]))


def test_columns_as_python_prints_them_are_named(tmp_path):
    record = {"instruction": "q", "completions": "[{'response': 'a', 'overall_score': 8.5}]"}
    assert 'the columns ["completions"] contain values as Python prints them' in refusal(as_csv(tmp_path, [record]))
    record = {"conversation": "[{'human': 'q', 'assistant': 'a'}]", "label": 1}
    assert "as Python prints them" in refusal(as_csv(tmp_path, [record]))


@pytest.mark.parametrize(
    "marks", [("\n\nHuman: q\n\nAssistant:", " a"), ("<extra_id_1>User\nq\n<extra_id_1>Assistant\n", "a")]
)
def test_answers_that_repeat_the_turns_of_the_prompt(tmp_path, marks):
    prompt, answer = marks
    records = [{"prompt": prompt, "completion": text, "label": True} for text in (prompt + answer, answer)]
    assert read(as_jsonl(tmp_path, records))[0] == [up("q", "a"), up("q", "a")]


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
@pytest.mark.parametrize("begin", [turns("q"), turns("q", "a")], ids=["question", "answer too"])
def test_an_answer_beside_its_conversation(tmp_path, container, begin):
    records = [{"messages": begin, "response": "a", "label": value} for value in (True, False)]
    rows, _, feedback = read(container(tmp_path, records))
    assert rows == [up("q", "a"), down("q", "a")]
    assert feedback.unused_columns() == []


def test_an_answer_that_differs_from_that_of_its_conversation_is_refused(tmp_path):
    record = {"messages": turns("q", "a"), "response": "b", "label": True}
    assert "--prompt-field" in refusal(as_jsonl(tmp_path, [record]))


def test_a_conversation_beside_prompt_and_answer_is_not_read(tmp_path):
    record = {"prompt": "q", "completion": "a", "label": True, "conversation": [{**user("x"), "rating": 3}]}
    rows, _, feedback = read(as_jsonl(tmp_path, [record]))
    assert rows == [up("q", "a")]
    assert feedback.unused_columns() == ["conversation"]


SPLITS = {"train": ROWS, "test": [{"prompt": "t", "completion": "c", "label": True}]}


@pytest.mark.parametrize("outer", [None, "data"])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_lists_of_splits_in_a_document(tmp_path, outer, indent):
    path = tmp_path / "f.json"
    path.write_text(json.dumps(SPLITS if outer is None else {"version": 1, outer: SPLITS}, indent=indent))
    rows, _, feedback = read(path)
    assert rows == [up("q", "a"), down("r", "b")]
    (note,) = feedback.notes()
    name = "train" if outer is None else "data.train"
    assert f'its 2 records were read under "{name}"; --split chooses among train, test.' in note
    assert read(path, split="test")[0] == [up("t", "c")]
    assert read(path, split="all")[0] == [up("q", "a"), down("r", "b"), up("t", "c")]
    assert 'found ["train", "test"]' in refusal(path, split="validation")


def test_a_document_of_finer_splits_asks_for_one(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"train_sft": ROWS, "train_prefs": ROWS}))
    assert "Name the one to read: --split train_prefs." in refusal(path)
    assert read(path, split="train_prefs")[0] == [up("q", "a"), down("r", "b")]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ({"my_thumb": 1}, {"my_thumb": 0}),
        ({"my_thumb": 1}, {"my_thumb": -1}),
        ({"my_stars": 5}, {"my_stars": 1}),
        ({"my rating": "hot"}, {"my rating": "cold"}),
        ({"meta": {"vote": "up"}}, {"meta": {"vote": "down"}}),
        ({"approved": True, "model": "m"}, {"approved": False}),
    ],
)
@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_feedback_under_an_unknown_key_of_messages_is_proposed(tmp_path, key, values, names):
    column, role, text = names
    users = [{role: "user", text: "q"}, {role: "user", text: "r"}]
    answers = [{role: "assistant", text: "a", **key}, {role: "assistant", text: "b", **values}]
    records = [{column: [users[0], answers[0], users[-1], answers[1]]}]
    path = as_jsonl(tmp_path, records)
    message = refusal(path)
    assert "no record has a label" in message
    (line,) = [one for one in message.splitlines() if "pass --label-field" in one]
    assert "(of messages)" in line
    words = shlex.split(line.split("pass ")[1].split(" (")[0].split(", ")[0])
    options = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=False)}
    assert [row[1] for row in read(path, **options)[0]] == [True, False]


NESTED = [{"ask": "q", "out": {"text": "a"}, "l": True}, {"ask": "r", "out": {"text": "b"}, "l": False}]
FIELDS = {"prompt_field": "ask", "completion_field": "out.text", "label_field": "l"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"prompt_field": "ask["},
            ['--prompt-field: nothing at "ask["; the record has ["ask", "out", "l"]', "it ends too early"],
        ),
        ({"prompt_field": "asked"}, ['--prompt-field: nothing at "asked"; the record has ["ask", "out", "l"]']),
        ({"completion_field": "out.txt"}, ['--completion-field: nothing at "out.txt"; "out" has ["text"]']),
        ({"completion_field": "out.text.x"}, ['"out.text" is "a"']),
        ({"completion_field": "out"}, ["'out'", 'its keys are ["text"]']),
        ({"completion_field": "lenght(out)"}, ["there is no function lenght()", "'length'"]),
        ({"completion_field": "join(out)"}, ["join() needs 2 arguments, got 1"]),
        ({"label_field": "length(l)"}, ["--label-field", "length() needs text or a list or an object, got true"]),
        ({"label_field": "ll"}, ['f.jsonl:1: --label-field: nothing at "ll"; the record has', "pass --label-field l"]),
    ],
)
def test_messages_about_paths_of_options(tmp_path, options, words):
    message = refusal(as_jsonl(tmp_path, NESTED), **{**FIELDS, **options})
    assert "f.jsonl:1: " in message
    for word in words:
        assert word in message
    for raw in ("Invalid jmespath", "Parse error", "received", "token"):
        assert raw not in message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "prompt: ask[\ncompletion: out.text\nlabel: l",
            'm.yaml: prompt: "ask[" is not a JMESPath expression: it ends too early.',
        ),
        ("prompt: ask out\ncompletion: out.text\nlabel: l", '"out" is not expected at character 5.'),
        ("prompt: ask\ncompletion: out#text\nlabel: l", 'it cannot be read from character 4, "#text".'),
        (
            "prompt: ask\ncompletion: nofunc(out)\nlabel: l",
            'm.yaml: completion: "nofunc(out)": there is no function nofunc().',
        ),
        ("prompt: ask\ncompletion: out.txt\nlabel: l", 'm.yaml: completion: nothing at "out.txt"; "out" has ["text"]'),
        (
            "prompt: ask\ncompletion: out.text\nlabel: lx",
            'm.yaml: label: nothing at "lx"; the record has ["ask", "out", "l"]',
        ),
        ("prompt: ask\ncompletion: 'join(`,`, out)'\nlabel: l", "join() needs "),
        ("conversation: ask\nlabel: l", 'm.yaml: conversation: "ask" must be a list of messages, got "q"'),
        ("turns: {messages: outs, label: l}", 'm.yaml: turns: messages: nothing at "outs"; the record has'),
        ("join: id\nturns: {messages: rows, label: l}", 'm.yaml: join: nothing at "id"; the record has'),
        ("each: outs\nprompt: ask\ncompletion: item\nlabel: l", 'm.yaml: each: nothing at "outs"; the record has'),
        ("records: all\nprompt: ask\ncompletion: out\nlabel: l", 'm.yaml: records: nothing at "all"; the record has'),
        ("zip: {a: ask}\nprompt: item.a\ncompletion: item.a\nlabel: l", 'zip: must be lists, got {"a": "q"}'),
        (
            "prompt: ask\npair: {a: out.text, b: ask, better: l, a_when: [x], b_when: [y]}",
            "names other values in a_when and b_when",
        ),
    ],
)
def test_messages_about_paths_of_a_mapping(tmp_path, lines, words):
    mapping = tmp_path / "m.yaml"
    mapping.write_text(lines)
    message = refusal(as_jsonl(tmp_path, NESTED), KTOError, map=str(mapping))
    assert words in message
    for raw in ("Invalid jmespath", "Parse error", "received", "token"):
        assert raw not in message


@pytest.mark.parametrize("name", ["rating (1-5)", "score(overall)", "What is [x]?", "a b"])
def test_an_option_may_be_a_key_that_is_no_expression(tmp_path, name):
    records = [{"prompt": "q", "completion": "a", name: 1}, {"prompt": "r", "completion": "b", name: 0}]
    rows, _, feedback = read(as_jsonl(tmp_path, records), label_field=name)
    assert rows == [up("q", "a"), down("r", "b")]
    assert feedback.unused_columns() == []


def test_nesting_too_deep_to_be_copied_is_a_defect_of_its_row_in_a_mapped_file_too(tmp_path):
    deep = json.loads("[" * 700 + "]" * 700)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": deep}}}]}
    records = [{"turns": [user("q"), call], "good": True}, {"turns": [user("q"), assistant("a")], "good": True}]
    mapping = tmp_path / "map.yaml"
    mapping.write_text("prompt: turns[0].content\ncompletion: turns[1:]\nlabel: good\n")
    data = as_jsonl(tmp_path, records)
    assert f"{data.name}:1: the record is nested too deeply" in refusal(data, map=str(mapping))
    assert len(read(data, map=str(mapping), on_bad_row="skip")[0]) == 1


@pytest.mark.parametrize("container", [as_jsonl, as_json], ids=name_of)
def test_a_message_inside_a_list_beside_labels_of_messages_is_refused(tmp_path, container):
    record = {"messages": [*turns("q", "a", "r"), [assistant("b")]], "labels": [True, False]}
    assert "message 4 of 'messages'" in refusal(container(tmp_path, [record]))


# The order as text is another one.
@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
@pytest.mark.parametrize(
    "record",
    [
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": "b", "rank": "10"}, {"answer": "a", "rank": "9"}],
        },
        {
            "context": [user("q")],
            "completions": [
                {"rank": "10", "completion": [assistant("b")]},
                {"rank": "9", "completion": [assistant("a")]},
            ],
        },
        {"question": "q", "answers": [{"text": "b", "pm_score": "9"}, {"text": "a", "pm_score": "10"}]},
    ],
    ids=["nectar", "nemo_rl", "stack_exchange_preferences"],
)
def test_ranks_that_are_text_are_numbers(tmp_path, container, record):
    rows, left_out, _ = read(container(tmp_path, [record]))
    assert [(row[0][-1], row[1]) for row in rows] == [("a", True), ("b", False)]
    assert left_out == {}


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize("column", ["images", "image", "audio", "attachments"])
@pytest.mark.parametrize("value", ["[]", "None", " ", {"bytes": None, "path": None}, [{"path": None}], "[null]"])
def test_a_column_of_media_without_any_leaves_no_row_out(tmp_path, container, column, value):
    record = {"prompt": "q", "completion": "a", "label": True, column: value}
    assert read(container(tmp_path, [record]))[:2] == ([up("q", "a")], {})
    other = {**record, column: {"bytes": None, "path": "a.png"} if isinstance(value, dict) else "a.png"}
    if not isinstance(value, list):
        assert read(container(tmp_path, [record, other]))[1] == {MEDIA: 1}


@pytest.mark.parametrize("value", ["[]", "None", {"bytes": None, "path": None}, [None]], ids=str)
def test_a_key_of_media_of_a_message_without_any_leaves_no_row_out(tmp_path, value):
    record = {"messages": [{**user("q"), "images": value}, assistant("a")], "label": True}
    assert read(as_jsonl(tmp_path, [record]))[:2] == ([up("q", "a")], {})


@pytest.mark.parametrize("container", [as_jsonl, as_csv], ids=name_of)
@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 50, "score_B": 2},
            ("by 'labels', 'human_ref_B' is better", "'score_A' is 50 and 'score_B' is 2"),
        ),
        (
            {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": 0.9},
            ("by 'score_0', 'answer_0' is better", "'score_1' is 0.9"),
        ),
    ],
    ids=["shp", "webgpt"],
)
def test_scores_that_contradict_the_better_answer_are_refused(tmp_path, container, record, words):
    message = refusal(container(tmp_path, [record]))
    assert [word for word in words if word not in message] == []


def test_scores_of_a_mapping_that_contradict_the_better_answer_are_refused(tmp_path):
    mapping = tmp_path / "m.yaml"
    mapping.write_text("prompt: q\npair: {chosen: good, rejected: bad, scores: [s.good, s.bad]}\n")
    record = {"q": "Q?", "good": "a", "bad": "b", "s": {"good": "9", "bad": "10"}}
    assert "'s.good' is 9 and 's.bad' is 10" in refusal(as_jsonl(tmp_path, [record]), map=str(mapping))
    record["s"]["bad"] = 9
    assert read(as_jsonl(tmp_path, [record]), map=str(mapping))[0] == pair("Q?", "a", "b")
    mapping.write_text("prompt: q\npair: {chosen: good, rejected: bad, scores: [s.good]}\n")
    assert "two scores" in refusal(as_jsonl(tmp_path, [record]), ConfigError, map=str(mapping))


BEAVERTAILS = {"prompt": "q", "response": "a", "category": "none"}


@pytest.mark.parametrize("container", [as_jsonl, as_csv], ids=name_of)
@pytest.mark.parametrize(
    ("is_safe", "beside", "words"),
    [
        ((True, False), ("down", "down"), "'thumbs' contradicts the label that was read in 1 of 2 rows"),
        ((True, False), (["down"], ["up"]), "'thumbs' contradicts the label that was read in 2 of 2 rows"),
        ((True, False), ("up", "down"), ""),
    ],
)
def test_other_verdicts_beside_a_recognised_format_are_compared(tmp_path, container, is_safe, beside, words):
    records = [{**BEAVERTAILS, "is_safe": safe, "thumbs": thumbs} for safe, thumbs in zip(is_safe, beside, strict=True)]
    _, _, found = read(container(tmp_path, records))
    assert found.mapping.name == "BeaverTails"
    notes = [note for note in found.notes() if "contradicts" in note]
    assert len(notes) == bool(words)
    assert all(words in note and "pass --label-field thumbs" in note for note in notes)


@pytest.mark.parametrize(
    ("mapping", "against"),
    [
        ("prompt: q\ncompletion: a\nlabel: {path: mine, up: [good], down: [poor]}\n", 2),
        ("prompt: q\ncompletion: a\nlabel: {path: rating, up: ['>=4'], down: ['<=2']}\n", 0),  # it is read itself
        ("each: several\nprompt: q\ncompletion: item.a\nlabel: item.vote\n", 0),  # a rating of several answers
    ],
)
def test_other_verdicts_beside_a_mapping_are_compared(tmp_path, mapping, against):
    beside = {"good": {"rating": 1, "vote": "up"}, "poor": {"rating": 5, "vote": "down"}}
    records = [
        {
            "q": "q",
            "a": "a",
            "mine": mine,
            "rating": one["rating"],
            "several": [{"a": "b", "vote": one["vote"]}, {"a": "c"}],
        }
        for mine, one in beside.items()
    ]
    (tmp_path / "m.yaml").write_text(f"name: mine\n{mapping}")
    _, _, found = read(as_jsonl(tmp_path, records), map=str(tmp_path / "m.yaml"))
    notes = [note for note in found.notes() if "contradicts" in note]
    assert len(notes) == bool(against)
    assert all(f"'rating' contradicts the label that was read in {against} of 2 rows" in note for note in notes)


@pytest.mark.parametrize("container", [as_jsonl, as_csv], ids=name_of)
@pytest.mark.parametrize(
    ("label", "key", "votes", "against", "proposal"),
    [
        ("thumbs", "score", (0.1, 0.9), 2, "--label-field score --up '>0.5' --down '<0.5'"),
        ("thumbs", "score", (0.9, 0.1), 0, ""),
        ("thumbs", "user_feedback", (False, False), 1, "--label-field user_feedback"),
        ("label", "user_feedback", ("up", None), 0, ""),
        ("label", "user_feedback", (None, "up"), 1, "--label-field user_feedback"),
    ],
)
def test_other_votes_of_each_judged_turn_are_compared_and_listed(
    tmp_path, container, label, key, votes, against, proposal
):
    answers = [
        {**assistant(text), label: verdict, key: vote}
        for text, verdict, vote in zip("ab", ("up", "down"), votes, strict=True)
    ]
    record = {"messages": [user("q"), answers[0], user("r"), answers[1]], "id": 1}
    read_rows, _, found = read(container(tmp_path, [record]))
    assert [row[1] for row in read_rows] == [True, False]
    assert found.unused_beside() == [f"messages[].{key}"]
    notes = [note for note in found.notes() if "contradicts" in note]
    assert len(notes) == bool(against)
    for note in notes:
        assert (
            f"contradicts the label that was read in {against} of {sum(vote is not None for vote in votes)} row" in note
        )
        assert proposal in note


def test_votes_of_messages_that_are_no_rows_are_listed(tmp_path):
    judged = [user("q"), {**assistant("a"), "score": 0.2, "thumbs": "down"}, user("r"), assistant("b")]
    other = [user("s"), {**assistant("a"), "label": True}, user("r"), {**assistant("b"), "user_feedback": False}]
    records = [{"messages": judged, "is_good": True}, {"messages": other, "is_good": None}]
    assert read(as_jsonl(tmp_path, records[:1]), label_field="is_good", one_class=True)[2].unused_beside() == [
        "messages[].score",
        "messages[].thumbs",
    ]
    found = read(as_jsonl(tmp_path, records[1:]))[2]
    assert found.unused_beside() == ["messages[].user_feedback"]  # of another message than the one that is judged
    assert not [note for note in found.notes() if "contradicts" in note]


def test_a_rule_that_reverses_ratings_of_turns_contradicts_nothing(tmp_path):
    turns = [user("q"), {**assistant("a"), "rating": 5}, user("r"), {**assistant("b"), "rating": 1}]
    read_rows, _, found = read(as_jsonl(tmp_path, [{"messages": turns}]), label_field="rating", up="<=2", down=">=4")
    assert ([row[1] for row in read_rows], found.notes()) == ([False, True], [])


@pytest.mark.parametrize(
    ("beside", "options"),
    [
        ({"labels": [0, 1]}, "--label-field labels or --label-field label,"),
        ({"labels": {"helpful": True}}, "--label-field labels or --label-field label,"),
        ({"up": 3, "down": 1}, "--label-field '{up: up, down: down}' or --label-field label,"),
    ],
)
def test_votes_of_the_record_beside_labels_of_its_messages_are_refused(tmp_path, beside, options):
    turns = [user("q"), {**assistant("a"), "label": True}, user("r"), {**assistant("b"), "label": False}]
    message = refusal(as_jsonl(tmp_path, [{"messages": turns, **beside}]))
    assert "only one of them can be the label" in message
    assert options in message


def test_a_judged_message_of_an_unknown_role_is_explained(tmp_path):
    turns = [user("q"), {"role": "chatModel", "content": "a", "thumbs": "up"}]
    message = refusal(as_jsonl(tmp_path, [{"messages": turns}]))
    assert (
        'has a label, but is not an answer of the assistant to a message. Its role, "chatModel", is not a known one'
        in message
    )
    turns = [user("q"), {**user("a"), "thumbs": "up"}]
    assert "Its role" not in refusal(as_jsonl(tmp_path, [{"messages": turns}]))


def test_a_label_beside_a_label_of_each_answer_is_refused(tmp_path):
    turns = [user("q"), assistant("a"), user("r"), assistant("b")]
    record = {"messages": turns, "labels": [True, False], "label": True}
    assert "Pass --label-field labels or --label-field label." in refusal(as_jsonl(tmp_path, [record]))
    assert [row[1] for row in read(as_jsonl(tmp_path, [record]), label_field="labels")[0]] == [True, False]
    assert len(read(as_jsonl(tmp_path, [record]), label_field="label", one_class=True)[0]) == 1
    assert (
        len(read(as_jsonl(tmp_path, [{**record, "labels": [True, True, False]}]), one_class=True)[0]) == 1
    )  # of raters


@pytest.mark.parametrize("container", [as_jsonl, as_csv], ids=name_of)
@pytest.mark.parametrize(
    ("key", "votes", "words"),
    [
        (
            "user_feedback",
            ("up", "up"),
            "'messages[].user_feedback' contradicts the label that was read in 1 of 2 rows",
        ),
        ("user_feedback", ("up", "down"), ""),
        ("was_helpful", (False, True), "'messages[].was_helpful' contradicts the label that was read in 2 of 2 rows"),
    ],
)
def test_votes_of_the_judged_message_that_contradict_the_label_are_named(tmp_path, container, key, votes, words):
    records = [
        {"messages": [user("q"), {**assistant("a"), key: vote}], "label": label}
        for vote, label in zip(votes, (True, False), strict=True)
    ]
    notes = [note for note in read(container(tmp_path, records))[2].notes() if "contradicts" in note]
    assert len(notes) == bool(words)
    assert all(words in note and f"pass --label-field {key}" in note for note in notes)


@pytest.mark.parametrize("container", [as_jsonl, as_csv], ids=name_of)
@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"helpful": "yes", "toxic": "no"}, {"label_field": "{helpful: helpful, toxic: toxic}"}),
        (
            {"scores": [{"name": "toxicity", "value": 1}]},
            {"label_field": "scores[?name=='toxicity'] | [0].value"},
        ),
        ({"toxicity": 0.9}, {"label_field": "toxicity", "rating_threshold": "0.5"}),
        ({"toxicity": 5}, {"label_field": "toxicity", "rating_scale": "0:5"}),
        *(
            ({name: 1}, {"label_field": name})
            for name in (
                *(
                    "not_useful",
                    "is_not_helpful",
                    "no good",
                    "needs_fix",
                    "reported",
                    "escalated",
                    "hallucination",
                    "schlecht",
                ),
                *("unresolved", "toxic"),
            )
        ),
        ({"meta": {"reported": 1}}, {"label_field": "meta.reported"}),
    ],
    ids=str,
)
def test_a_label_whose_name_is_that_of_what_is_bad_is_refused_on_every_route(tmp_path, container, record, options):
    message = refusal(container(tmp_path, [{"prompt": "q", "completion": "a", **record}]), **options)
    assert "seems to name what is undesirable" in message
    assert "up: [false]" in message if "helpful" in record else "--up" in message


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"helpful": 1, "not_toxic": 1}, {"label_field": "{helpful: helpful, safe: not_toxic}"}),
        ({"scores": [{"name": "kind", "value": True}]}, {"label_field": "scores[?name=='kind'] | [0].value"}),
        ({"toxic": False}, {"label_field": "toxic == `false`"}),
        ({"toxicity": 0.1}, {"label_field": "toxicity", "up": "<0.5", "down": ">=0.5"}),
        ({"kindness": 5}, {"label_field": "kindness", "rating_scale": "0:5"}),
        *(
            ({name: 1}, {"label_field": name})
            for name in ("note_useful", "error_free", "network", "no_errors", "noteworthy")
        ),
    ],
    ids=str,
)
def test_other_names_are_labels(tmp_path, record, options):
    assert read(as_jsonl(tmp_path, [{"prompt": "q", "completion": "a", **record}]), **options)[0] == [up("q", "a")]


def test_messages_of_flowise_without_the_kind_of_their_memory(tmp_path):
    turns = [{"content": "q", "role": "userMessage", "time": "1"}]
    turns.append({"content": "a", "role": "apiMessage", "time": "2", "feedback": "Helpful"})
    message = refusal(as_json(tmp_path, [{"source": "UI", "sessionId": "s", "messages": turns}]))
    assert "Flowise messages: this export contains the comment of a feedback" in message


@pytest.mark.parametrize(
    ("printed", "as_json"),
    [
        ("[True, False]", "Write JSON: [true, false]"),
        ("[None, 1]", "Write JSON: [null, 1]"),
        ("(1, 0)", "Write JSON: [1, 0]"),
        ("[1 0 1]", "Write JSON (json.dumps"),
        ("[ True False]", "Write JSON (json.dumps"),
        ("['up', 'down']", 'Write JSON: ["up", "down"]'),
    ],
)
def test_votes_as_python_prints_them_are_not_unrated(tmp_path, printed, as_json):
    records = [
        {"prompt": "q", "completion": "a", "labels": [1, 1]},
        {"prompt": "r", "completion": "b", "labels": printed},
    ]
    message = refusal(as_csv(tmp_path, records))
    assert f"f.csv:3: 'labels' is {json.dumps(printed)}, as Python prints it. {as_json}" in message
    assert len(read(as_csv(tmp_path, records[:1]))[0]) == 1


def test_columns_and_corrections_of_langfuse_are_no_scores(tmp_path):
    trace = {
        "id": "t",
        "timestamp": "2025",
        "name": "chat",
        "input": "q",
        "output": "a",
        "metadata": {},
        "internal_model_id": "m",
    }
    columns = {"total_cost": 1, "html_path": "/x", "tokens_per_second": 3, "user-feedback": [1]}
    assert read(as_jsonl(tmp_path, [{**trace, **columns}]))[0] == [up("q", "a")]
    scores = [{"name": "user-feedback", "value": 0, "dataType": "NUMERIC"}]
    corrected = {"name": "output", "stringValue": "b", "value": 0, "dataType": "CORRECTION"}
    assert read(as_jsonl(tmp_path, [{**trace, "scores": [*scores, corrected]}]))[0] == [down("q", "a")]


def test_turns_of_question_and_answer_are_judged(tmp_path):
    turns = [{"human": "q", "assistant": "a", "label": True}, {"human": "r", "assistant": "b", "label": False}]
    rows = [up("q", "a"), down("q", "a", "r", "b")]
    assert read(as_jsonl(tmp_path, [{"conversation": turns}]))[0] == rows
    plain = [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]
    assert read(as_jsonl(tmp_path, [{"conversation": plain, "labels": [1, 0]}]))[0] == rows


def test_a_vote_on_the_message_of_the_answer_is_compared(tmp_path):
    asked = [user("p"), {**assistant("x"), "rating": 5}, user("q")]
    records = [
        {"prompt": asked, "completion": [{**assistant("a"), "rating": rating}], "label": label}
        for rating, label in ((1, True), (5, False))
    ]
    (note,) = [note for note in read(as_jsonl(tmp_path, records))[2].notes() if "contradicts" in note]
    assert note.startswith("'completion[].rating' contradicts the label that was read in 2 of 2 rows")


@pytest.mark.parametrize("name", ["winner", "preference"])
def test_a_verdict_for_the_rejected_side_is_refused(tmp_path, name):
    record = {"prompt": "q", "chosen": "a", "rejected": "b", name: "Rejected"}
    assert f"'{name}' is \"Rejected\", so 'rejected' is better than 'chosen'" in refusal(as_jsonl(tmp_path, [record]))


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("beside", "name", "value"),
    [
        ({"chosen_score": "4,5", "rejected_score": "5"}, "chosen_score", '"4,5"'),
        ({"chosen_rating": 4, "rejected_rating": " 3,5 "}, "rejected_rating", '" 3,5 "'),
        ({"scores": {"chosen": "4,5", "rejected": 4}}, "scores.chosen", '"4,5"'),
        ({"margin": "-0,5"}, "margin", '"-0,5"'),
    ],
)
def test_ratings_of_a_pair_with_a_decimal_comma_are_refused(tmp_path, beside, name, value):
    message = refusal(as_jsonl(tmp_path, [{**PAIR, **beside}]))
    assert f"f.jsonl:1: '{name}' is {value}. Write decimal numbers with a point." in message


@pytest.mark.parametrize(
    ("beside", "unused"),
    [
        ({"winner": "B"}, ["winner"]),
        ({"winner": "Chosen"}, []),
        ({"margin": "large"}, ["margin"]),
        ({"margin": 1}, []),
        ({"chosen_score": "good", "rejected_score": "bad"}, ["chosen_score", "rejected_score"]),
        ({"chosen_score": 2, "rejected_score": 1}, []),
    ],
)
def test_columns_of_a_pair_that_say_nothing_are_listed_as_not_read(tmp_path, beside, unused):
    rows, _, found = read(as_jsonl(tmp_path, [{**PAIR, **beside}]))
    assert [label for _, label, _ in rows] == [True, False]
    assert found.unused_columns() == unused


@pytest.mark.parametrize("container", [as_jsonl, as_csv], ids=name_of)
@pytest.mark.parametrize(
    ("output", "key"),
    [
        ({"choices": [{"finish_reason": "length", "message": assistant("a")}]}, "output.choices[].finish_reason"),
        ({"choices": [{"finish_reason": "stop", "message": assistant("a")}]}, ""),
        ({"stop_reason": "max_tokens", "content": [{"type": "text", "text": "a"}]}, "output.stop_reason"),
        (
            {"candidates": [{"finishReason": "MAX_TOKENS", "content": {"role": "model", "parts": [{"text": "a"}]}}]},
            "output.candidates[].finishReason",
        ),
        ({"answer": "its finish_reason is length"}, ""),
    ],
)
def test_logged_answers_that_were_cut_are_warned_of(tmp_path, container, output, key):
    call = {"id": "t", "timestamp": "2026-01-01", "name": "n", "input": "q", "output": output, "metadata": {}}
    found = read(container(tmp_path, [{**call, "scores": [{"name": "thumb", "value": 1}]}]))[2]
    notes = [note for note in found.notes() if "was cut" in note]
    assert len(notes) == bool(key)
    assert all(f"records whose '{key}" in note for note in notes)


def test_an_earlier_answer_that_is_empty_is_warned_of(tmp_path):
    talk = [user("q"), assistant(""), user("r"), assistant("a")]
    call = {**assistant(""), "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}
    called = [user("q"), call, {"role": "tool", "tool_call_id": "c", "content": "1"}, assistant("a")]
    path = as_jsonl(tmp_path, [{"messages": called, "label": True}, {"messages": talk, "label": False}])
    feedback = Feedback(PrecomputeConfig(model="m", data=str(path)), has_template=True)
    for row in feedback.rows():
        feedback.keep(row)
    (note,) = feedback.notes()
    assert note.startswith("rows with an earlier answer that is empty: 1 (first: f.jsonl:2).")


def test_a_correction_alone_is_counted_as_one(tmp_path):
    call = {"id": "t", "timestamp": "2026-01-01", "name": "n", "input": "q", "output": "a", "metadata": {}}
    fix = {"name": "fix", "dataType": "CORRECTION", "stringValue": "better", "value": 0}
    thumb = {"name": "thumb", "value": 1, "dataType": "NUMERIC"}
    records = [{**call, "scores": scores} for scores in ([fix], [thumb, fix], [])]
    rows, left_out, _ = read(as_jsonl(tmp_path, records))
    assert [label for _, label, _ in rows] == [True]
    assert left_out == {CORRECTED: 1, UNRATED: 1}
    assert "corrected, but not rated" in refusal(as_jsonl(tmp_path, records[:1]))


@pytest.mark.parametrize("contents", ["Hi", ["Hi"]])
def test_contents_that_are_text_are_the_question_of_a_call(tmp_path, contents):
    record = {
        "op_name": "weave:///x",
        "inputs": {"model": "m", "contents": contents},
        "output": {"candidates": [{"content": {"parts": [{"text": "Hello"}], "role": "model"}}]},
        "summary": {"weave": {"feedback": [{"feedback_type": "wandb.reaction.1", "payload": {"emoji": "\U0001f44d"}}]}},
    }
    assert read(as_jsonl(tmp_path, [record]))[0] == [(["Hi", "Hello"], True, False)]
    record["inputs"] |= {"question": "And you?", "contents": "some text"}  # which is another's
    assert read(as_jsonl(tmp_path, [record]))[0] == [(["And you?", "Hello"], True, False)]


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("record", "used"),
    [
        ({"question": "q", "answer": "#### 4"}, "answer"),
        ({"prompt": "q", "completion": "#### 4"}, "completion"),
        ({"instruction": "q", "input": "", "output": "#### 4"}, "output"),
        ({"messages": turns("q", "#### 4")}, "the last message of 'messages"),
    ],
)
@pytest.mark.parametrize("name", ["prediction", "model_output", "llmAnswer", "Generated Text", "reply", "candidate"])
def test_the_expected_answer_is_not_trained_in_place_of_the_models(tmp_path, container, record, used, name):
    path = container(tmp_path, [{**record, "label": False, name: "It is 4"}])
    message = refusal(path)
    assert f"{used}' and '{name}' differ" in message
    assert "--completion-field " in message
    field = name if name.isidentifier() else f'"{name}"'
    options = {"prompt_field": "messages[:-1]"} if "messages" in record else {}
    assert read(path, completion_field=field, **options)[0] == [down("q", "It is 4")]


@pytest.mark.parametrize(
    "beside",
    [
        {"prediction": " c "},
        {"prediction": "1"},
        {"prediction": 0.3},
        {"output": ""},
        {"candidate": "model-a"},
        {"response_model": "llama-3"},
        {"text": "User: p\nBot: c"},
        {"reply_count": "two or more"},
    ],
)
def test_columns_that_are_no_other_answer_are_passed_over(tmp_path, beside):
    assert read(as_jsonl(tmp_path, [{"prompt": "p", "completion": "c", "label": True, **beside}]))[0] == [up("p", "c")]


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    "names",
    [
        ("chosen_helpfulness", "rejected_helpfulness"),
        ("chosenScore", "rejectedScore"),
        ("quality_chosen", "quality_rejected"),
        ("chosen elo", "rejected elo"),
        ("chosen_upvotes", "rejected_upvotes"),
        ("score_c", "score_r"),
        ("rejected_rank", "chosen_rank"),
    ],
)
def test_a_pair_whose_numbers_say_the_opposite_is_refused(tmp_path, container, names):
    better, worse = names
    rows, _, found = read(container(tmp_path, [{**PAIR, better: 5, worse: 1}]))
    assert rows == pair("q", "a", "b")
    assert found.unused_columns() == []
    message = refusal(container(tmp_path, [{**PAIR, better: 1, worse: 5}]))
    assert "ed above 'chosen'" in message
    assert all(part in message for part in (f"{better} 1", f"{worse} 5"))


@pytest.mark.parametrize(
    "beside",
    [
        {"chosen_length": 1, "rejected_length": 5},
        {"chosen_logp": -9, "rejected_logp": -1},
        {"chosen_toxicity_score": 1, "rejected_toxicity_score": 5},
        {"chosen_helpfulness": 5, "rejected_helpfulness": 1, "chosen_verbosity": 1, "rejected_verbosity": 5},
        {"chosen_score": 5, "rejected_score": 1, "chosen_relevance": 1, "rejected_relevance": 5},
        {"chosen_helpfulness": 3, "rejected_helpfulness": 3},
        {"rating": [1, 5], "generations": ["b", "a"]},
        {"rating": [1, 5, 3]},
        {"tie": False, "swapped": False, "chosen_is_better": True, "valid": True},
        {"judge": "Both answers name the capital, but the first one is complete."},
        {"confidence": 0.0},
    ],
)
def test_numbers_and_flags_that_fit_a_pair_change_nothing(tmp_path, beside):
    rows, _, found = read(as_jsonl(tmp_path, [{**PAIR, **beside}]))
    assert rows == pair("q", "a", "b")
    assert found.notes() == []


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    "beside", [{"tie": True}, {"is_tie": 1}, {"isTie": "yes"}, {"human_choice": "tie"}, {"score_c": 2, "score_r": 2}]
)
def test_a_tie_of_any_name_is_left_out(tmp_path, container, beside):
    rows, left_out, found = read(container(tmp_path, [{**PAIR, **beside}, {**PAIR, "prompt": "r"}]))
    assert rows == pair("r", "a", "b")
    assert left_out == {TIE: 1}
    assert found.unused_columns() == []


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    "beside",
    [
        {"human_choice": "rejected"},
        {"better": "Rejected"},
        {"annotator_choice": "rejected"},
        {"vote": "rejected"},
        {"chosen_is_better": False},
        {"rejected_is_better": True},
        {"rating": [1, 5]},
    ],
)
def test_a_verdict_of_any_name_for_the_rejected_side_is_refused(tmp_path, container, beside):
    assert "Swap them" in refusal(container(tmp_path, [{**PAIR, **beside}]))


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("winner", "B"), ("preferred", "b"), ("judge", "answer_b"), ("choice", 2), ("status", "rejected")],
        *[("swapped", True), ("is_flipped", 1), ("agree", False), ("valid", False)],
    ],
)
def test_a_verdict_that_may_mean_the_rejected_side_is_warned_of(tmp_path, container, name, value):
    rows, _, found = read(container(tmp_path, [{**PAIR, name: value}, {**PAIR, "prompt": "r", name: None}]))
    assert rows == [*pair("q", "a", "b"), *pair("r", "a", "b")]
    (note,) = found.notes()
    assert note.startswith(f"pairs whose '{name}' may mean that 'rejected' is the better side: 1 (first: f.")


@pytest.mark.parametrize(("repeating", "warned"), [(3, True), (1, False)])
def test_short_prompts_that_most_answers_repeat_are_warned_of(tmp_path, repeating, warned):
    records = [
        {"prompt": f"{number}+1?", "completion": f"{number}+1? 2" if number < repeating else "2", "label": True}
        for number in range(4)
    ]
    notes = read(as_jsonl(tmp_path, records))[2].notes()
    assert [note.startswith("rows whose answer begins with the whole prompt: 3 (") for note in notes] == [True] * warned


def proposed_mapping(folder, message):
    """Write the lines that a message proposes to a file."""
    path = folder / "m.yaml"
    path.write_text("\n".join(dict.fromkeys(re.findall(r"`((?:prompt|pair): [^`]+)`", message))) + "\n")
    return str(path)


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        *[("accepted", "rejected"), ("best", "worst"), ("response_w", "response_l"), ("pos_resp", "neg_resp")],
        *[("chosen_text", "rejected_text"), ("winner answer", "loser answer"), ("better", "worse")],
    ],
)
def test_a_pair_in_columns_of_other_names_is_proposed(tmp_path, container, better, worse):
    path = container(tmp_path, [{"question": "q", worse: "b", better: "a"}])
    mapping = proposed_mapping(tmp_path, refusal(path))
    assert read(path, map=mapping)[0] == pair("q", "a", "b")


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        *[("left", "right", ("left", "right")), ("text_first", "text_second", ("first", "second"))],
        *[("output_1", "output_2", (1, 2)), ("output_0", "output_1", (0, 1)), ("answer_a", "answer_b", ("A", "B"))],
        *[("answer_1", "answer_2", ("answer_1", "answer_2")), ("answer_1", "answer_2", ("model_1", "model_2"))],
    ],
)
def test_a_pair_and_its_winner_are_proposed(tmp_path, container, first, second, values):
    records = [{"question": f"q{value}", first: "a", second: "b", "winner": value} for value in values]
    path = container(tmp_path, records)
    mapping = proposed_mapping(tmp_path, refusal(path))
    assert read(path, map=mapping)[0] == [*pair(f"q{values[0]}", "a", "b"), *pair(f"q{values[1]}", "b", "a")]


def test_a_winner_whose_numbers_are_not_clear_is_not_proposed(tmp_path):
    record = {"question": "q", "answer_a": "a", "answer_b": "b", "winner": 1}
    assert "pair: {" not in refusal(as_jsonl(tmp_path, [record]))


@pytest.mark.parametrize("container", [as_jsonl, as_csv, as_parquet], ids=name_of)
def test_an_option_may_name_a_key_with_a_dot(tmp_path, container):
    records = [{"In.q": f"{good}?", "In.a": "x", "Answer.rating": good} for good in (True, False)]
    options = {"prompt_field": "In.q", "completion_field": "In.a", "label_field": "Answer.rating"}
    rows, _, feedback = read(container(tmp_path, records), **options)
    assert [(prompt, label) for (prompt, _), label, _ in rows] == [("True?", True), ("False?", False)]
    assert feedback.unused_columns() == []


def test_a_key_with_a_dot_comes_before_a_path(tmp_path):
    nested = {"prompt": "q", "Answer": {"text": "nested"}, "label": True}
    options = {"completion_field": "Answer.text"}
    assert read(as_jsonl(tmp_path, [nested]), **options)[0] == [up("q", "nested")]
    assert read(as_jsonl(tmp_path, [{**nested, "Answer.text": "own"}]), **options)[0] == [up("q", "own")]


@pytest.mark.parametrize("words", [("yes", "no"), ("on", "off")])
def test_words_that_yaml_reads_as_booleans_must_be_quoted(tmp_path, words):
    good, bad = words
    path = as_jsonl(tmp_path, [{"q": "q", "a": good, "ok": good}, {"q": "q", "a": bad, "ok": bad}])
    mapping = tmp_path / "m.yaml"
    mapping.write_text(f"prompt: q\ncompletion: a\nlabel: {{path: ok, up: [{good}], down: [{bad}]}}\n")
    message = refusal(path, map=str(mapping))
    assert f'Put the words of up and down in quotes: "{good}", "{bad}".' in message
    assert "--up" not in message
    mapping.write_text(f'prompt: q\ncompletion: a\nlabel: {{path: ok, up: ["{good}"], down: ["{bad}"]}}\n')
    assert read(path, map=str(mapping))[0] == [up("q", good), down("q", bad)]
    mapping.write_text("prompt: q\ncompletion: a\nlabel: {path: ok, up: [true], down: [false]}\n")
    assert "in quotes" not in refusal(as_jsonl(tmp_path, [{"q": "q", "a": "x", "ok": "fine"}]), map=str(mapping))
