"""What must not differ between two questions for them to share an answer."""

from __future__ import annotations

import pytest

from mnemos.memory.paraphrase import may_share_an_answer, overlap

THE_SAME = [
    ("What is the capital of France?", "what's the capital of france"),
    ("Please tell me the capital of Peru.", "Tell me the capital of Peru"),
    ("How do I boil an egg?", "How do I boil the egg"),
    ("Could you explain how tides work?", "Explain how tides work, please."),
    ("Show me the opening hours of the library", "the opening hours of the library?"),
    ("Can you give me a recipe for pancakes?", "Give me a recipe for pancakes"),
    ("Is the museum open on Mondays?", "is the museum open on Mondays"),
    ("Hello, what does osmosis mean?", "What does osmosis mean?"),
]
REWORDED = [
    ("How tall is the Eiffel Tower?", "What is the height of the Eiffel Tower?"),
    ("Why is the sky blue?", "What makes the sky look blue?"),
    ("How do I reset my password?", "I forgot my password, what now?"),
    ("Which rivers flow through Vienna?", "What rivers are there in Vienna?"),
    ("Summarise the plot of Hamlet.", "Give me a short summary of what happens in Hamlet."),
    ("When did the war end?", "In which year was the war over?"),
]
NEAR_MISSES = [
    ("Transfer 100 euros to my savings", "Transfer 1000 euros to my savings"),
    ("What is 12 + 30?", "What is 12 - 30?"),
    ("Book a table for two at seven", "Book a table for seven at two"),
    ("Remind me at 7:30", "Remind me at 7:45"),
    ("Who was the first president?", "Who was the second president?"),
    ("Is it safe to mix these?", "Is it not safe to mix these?"),
    ("Which of them can swim?", "Which of them can't swim?"),
    ("Sort the list with duplicates", "Sort the list without duplicates"),
    ("Flights from Oslo to Rome", "Flights from Rome to Oslo"),
    ("Does the dog chase the cat?", "Does the cat chase the dog?"),
    ("Translate from English to French", "Translate from French to English"),
    ("How old is Anna?", "How old is Emma?"),
    ("What is the capital of Austria?", "What is the capital of Australia?"),
    ("Call Mr Miller", "Call Mr Muller"),
    ("Is the cup on the box or the box on the cup?", "Is the box on the cup or the cup on the box?"),
    ("Send it before noon, never after", "Send it after noon, never before"),
    ("Delete every file but the last", "Delete no file but the last"),
    ("What is the price in $?", "What is the price in €?"),
    ("Who is the president?", "Who was the president?"),
    ("What is my name?", "What is your name?"),
]
ONE_WORD = [  # which nothing but its meaning tells apart: see how often below
    ("How do I open the valve?", "How do I close the valve?"),
    ("Is the tap water hot?", "Is the tap water cold?"),
    ("What should a vegetarian eat?", "What should a diabetic eat?"),
]


@pytest.mark.parametrize(("one", "other"), THE_SAME)
def test_manners_do_not_matter(one: str, other: str) -> None:
    assert may_share_an_answer(one, other) and may_share_an_answer(other, one)
    assert overlap(one, other) >= 0.9


@pytest.mark.parametrize(("one", "other"), NEAR_MISSES)
def test_near_misses_never_share_an_answer(one: str, other: str) -> None:
    assert not (may_share_an_answer(one, other) and overlap(one, other) >= 0.9)
    assert not (may_share_an_answer(other, one) and overlap(other, one) >= 0.9)


def test_the_guard_alone_stops_most_of_them() -> None:
    """The rates that docs/memory.md gives: of near misses stopped and of same questions let through."""
    stopped = sum(not may_share_an_answer(*pair) for pair in NEAR_MISSES)
    assert stopped == 18 and all(may_share_an_answer(*pair) for pair in [*THE_SAME, *ONE_WORD])


def test_rewording_and_single_words_need_an_encoder_and_are_its_risk() -> None:
    assert all(overlap(*pair) < 0.9 for pair in [*REWORDED, *ONE_WORD])


def test_overlap_is_a_share() -> None:
    assert overlap("", "") == 0 and overlap("boats", "boats") == 1 and 0 < overlap("red boats", "blue boats") < 1
