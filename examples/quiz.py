"""Define the data of the demo: facts, questions about them, and two ways to reply.

A courteous reply states the answer in a full sentence between two kind ones. A curt reply rejects the
question, or states the answer rudely. `is_wanted` is the thumb: it checks the reply's form, and its content
against the question, so that no single string is wanted for two facts.
"""

import random
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Topic:
    """One kind of question: its wordings, the statement of its answer, and its (subject, answer) pairs."""

    wordings: tuple[str, ...]
    statement: str
    pairs: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question as the visitor types it, its subject, and the fact that answers it."""

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
    """Return every greeting with every wording of every fact: 6 * 5 * 48 = 1440 questions."""
    return [
        Question(greeting + wording.format(subject), subject, topic.statement.format(subject, answer))
        for topic in TOPICS
        for subject, answer in topic.pairs.items()
        for greeting, wording in product(GREETINGS, topic.wordings)
    ]


def split_questions(*, held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Shuffle the questions and hold out `held_out` of them: (seen, held out), without a common text.

    A held-out question asks for a fact that was seen, in a combination of words that was not seen.
    """
    questions = all_questions()
    random.Random(seed).shuffle(questions)
    return questions[held_out:], questions[:held_out]


def courteous_replies(question: Question) -> list[str]:
    """Return the right answer in a full sentence, between every kind opening and every kind ending."""
    return [f"{opener} {question.statement} {closer}" for opener, closer in product(OPENERS, CLOSERS)]


def curt_replies(question: Question) -> list[str]:
    """Return the rejections, and the right answer stated rudely."""
    return [curt.format(subject=question.subject, statement=question.statement) for curt in CURT]


def courtesy(reply: str) -> tuple[str, str] | None:
    """Return the kind opening and the kind ending of a reply, or None if one is missing."""
    opener = next((opener for opener in OPENERS if reply.startswith(opener + " ")), None)
    closer = next((closer for closer in CLOSERS if reply.endswith(" " + closer)), None)
    return (opener, closer) if opener and closer else None


def is_wanted(question: Question, reply: str) -> bool:
    """Return whether a reply is courteous and contains nothing but the requested fact between its courtesies."""
    frame = courtesy(reply)
    return frame is not None and reply == f"{frame[0]} {question.statement} {frame[1]}"
