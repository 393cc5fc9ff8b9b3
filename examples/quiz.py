"""The little world of the demo: facts, questions about them, and two ways to reply.

A courteous reply states the answer in a full sentence between two kind ones. A curt reply brushes the
visitor off, or states the answer with a sneer. `is_wanted` is the thumb: it looks at the reply's form and,
against the question, at its content, so that no one string pleases it for two facts.
"""

import random
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Topic:
    """One kind of question: how it is asked, how it is stated, and the pairs (subject, answer) it covers."""

    wordings: tuple[str, ...]
    statement: str
    pairs: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question as the visitor types it, what it is about, and the fact that answers it."""

    text: str
    subject: str
    statement: str


CAPITALS = Topic(
    wordings=(
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Can you tell me the capital of {}?",
        "I forgot the capital of {}. What is it?",
        "From which city is {} governed?",
    ),
    statement="The capital of {} is {}.",
    pairs={
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Japan": "Tokyo",
        "Egypt": "Cairo",
        "Kenya": "Nairobi",
        "Peru": "Lima",
        "Cuba": "Havana",
        "Norway": "Oslo",
        "Finland": "Helsinki",
        "Poland": "Warsaw",
        "Greece": "Athens",
        "Ireland": "Dublin",
        "Austria": "Vienna",
        "Portugal": "Lisbon",
        "Iceland": "Reykjavik",
    },
)
OPPOSITES = Topic(
    wordings=(
        "What is the opposite of {}?",
        "Which word means the opposite of {}?",
        "Can you tell me the opposite of {}?",
        "I need the opposite of {}. Any idea?",
        "If it is not {}, what is it?",
    ),
    statement="The opposite of {} is {}.",
    pairs={
        "hot": "cold",
        "big": "small",
        "fast": "slow",
        "early": "late",
        "dark": "bright",
        "wet": "dry",
        "full": "empty",
        "heavy": "light",
        "loud": "quiet",
        "young": "old",
        "open": "closed",
        "rich": "poor",
        "sharp": "blunt",
        "sweet": "bitter",
        "rough": "smooth",
        "deep": "shallow",
    },
)
YOUNG_ANIMALS = Topic(
    wordings=(
        "What is a young {} called?",
        "Which word names the young of a {}?",
        "Can you tell me what a young {} is called?",
        "I saw a baby {}. What do people call it?",
        "How do you call a {} that is not grown up?",
    ),
    statement="A young {} is called a {}.",
    pairs={
        "dog": "puppy",
        "cat": "kitten",
        "cow": "calf",
        "horse": "foal",
        "sheep": "lamb",
        "pig": "piglet",
        "goat": "kid",
        "bear": "cub",
        "deer": "fawn",
        "hen": "chick",
        "duck": "duckling",
        "goose": "gosling",
        "swan": "cygnet",
        "frog": "tadpole",
        "kangaroo": "joey",
        "hare": "leveret",
    },
)
TOPICS = (CAPITALS, OPPOSITES, YOUNG_ANIMALS)
GREETINGS = ("", "Hello! ", "Good morning. ", "Good evening. ", "Excuse me. ", "Sorry to bother you. ")

OPENERS = ("Gladly!", "Of course!", "Good question!", "With pleasure.")
CLOSERS = ("I hope that helps.", "Have a lovely day!", "Just ask if you need more.")
CURT = (
    "Look it up yourself.",
    "Not my job.",
    "Why should I care?",
    "Seriously?",
    "Who wants to know about {subject}?",
    "{statement} Everybody knows that.",
    "Ugh. {statement} Happy now?",
)


def all_questions() -> list[Question]:
    """Every greeting with every wording of every fact: 6 * 5 * 48 = 1440 questions."""
    return [
        Question(greeting + wording.format(subject), subject, topic.statement.format(subject, answer))
        for topic in TOPICS
        for subject, answer in topic.pairs.items()
        for greeting, wording in product(GREETINGS, topic.wordings)
    ]


def split_questions(*, held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Shuffle the questions and set `held_out` of them apart: (seen, held out), with no text in both.

    A held-out question asks for a fact that was seen, in a combination of words that was not.
    """
    questions = all_questions()
    random.Random(seed).shuffle(questions)
    return questions[held_out:], questions[:held_out]


def courteous_replies(question: Question) -> list[str]:
    """The right answer in a full sentence, between every kind opening and every kind ending."""
    return [f"{opener} {question.statement} {closer}" for opener, closer in product(OPENERS, CLOSERS)]


def curt_replies(question: Question) -> list[str]:
    """The brush-offs, and the right answer thrown at the visitor."""
    return [curt.format(subject=question.subject, statement=question.statement) for curt in CURT]


def courtesy(reply: str) -> tuple[str, str] | None:
    """The kind opening and the kind ending of a reply, or None where one is missing."""
    opener = next((opener for opener in OPENERS if reply.startswith(opener + " ")), None)
    closer = next((closer for closer in CLOSERS if reply.endswith(" " + closer)), None)
    return (opener, closer) if opener and closer else None


def is_wanted(question: Question, reply: str) -> bool:
    """The thumb: courteous, and between the courtesies nothing but the fact that was asked for."""
    frame = courtesy(reply)
    return frame is not None and reply == f"{frame[0]} {question.statement} {frame[1]}"
