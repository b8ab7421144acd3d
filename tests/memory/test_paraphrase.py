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
ONE_WORD = [  # which nothing but its meaning tells apart
    ("How do I open the valve?", "How do I close the valve?"),
    ("Is the tap water hot?", "Is the tap water cold?"),
    ("What should a vegetarian eat?", "What should a diabetic eat?"),
]
MORE_NEAR_MISSES = [
    (
        "How do I open the small valve on the left side of the boiler in the basement?",
        "How do I close the small valve on the left side of the boiler in the basement?",
    ),
    (
        "Write a polite letter to my landlord in which I accept the new rent from May on",
        "Write a polite letter to my landlord in which I reject the new rent from May on",
    ),
    (
        "Give me the list of all users who logged in before the update was rolled out to production",
        "Give me the list of all users who logged in after the update was rolled out to production",
    ),
    (
        "What are the most common side effects of the medicine for adults who take it daily?",
        "What are the most common side effects of the medicine for children who take it daily?",
    ),
    ("Tell me a joke", "Explain a joke"),
    ("Show me the code", "Explain the code"),
    ("Can you swim?", "Do you swim?"),
    ("Can I mix bleach and vinegar?", "Do I mix bleach and vinegar?"),
    ("Tell me about you", "Tell me about us"),
    ("Give me my money", "Give me your money"),
    (
        "Delete the file from the folder on my desktop that I made this morning",
        "Delete the files from the folder on my desktop that I made this morning",
    ),
    (
        "Is the increase of the temperature in the northern lakes a risk for the fish in them?",
        "Is the decrease of the temperature in the northern lakes a risk for the fish in them?",
    ),
    ("Who is taller, Anna or Ben?", "Who is taller, Ben or Carl?"),
    ("Did Germany beat Brazil?", "Did Brazil beat Germany?"),
    ("Convert 5 miles to kilometres", "Convert 5 kilometres to miles"),
    ("What is 3 * 4?", "What is 3 + 4?"),
    ("What is 1/2 of 10?", "What is 1/20 of 10?"),
    ("Set an alarm for 6 am", "Set an alarm for 6 pm"),
    ("Pay twenty dollars to Sam", "Pay thirty dollars to Sam"),
    ("Pay $20 to Sam", "Pay €20 to Sam"),
    ("Should I take it with food?", "Shouldn't I take it with food?"),
    ("Is there any evidence that it works?", "Is there no evidence that it works?"),
    ("List the animals that are dangerous", "List the animals that aren't dangerous"),
    ("Everyone but Tom came; who came?", "Everyone and Tom came; who came?"),
    ("Which planet is the hottest?", "Which planet is the coldest?"),
    ("Which planet is the second hottest?", "Which planet is the third hottest?"),
    ("How many people live in North Korea?", "How many people live in South Korea?"),
    ("How many people live in Georgia, the state?", "How many people live in Georgia, the country?"),
    ("Who wrote the book?", "Who read the book?"),
    (
        "Write a poem about my mother in the style of the old masters with many rhymes",
        "Write a poem about my father in the style of the old masters with many rhymes",
    ),
    ("Is Python 3.1 supported?", "Is Python 3.10 supported?"),
    ("What happened on 01/02/2020?", "What happened on 02/01/2020?"),
    ("Translate this to Spanish: I love you", "Translate this to Spanish: I loved you"),
    ("He told her that she won, who won?", "She told her that he won, who won?"),
    ("Turn the lights on", "Turn the lights off"),
    (
        "Turn on the light in the kitchen, then turn off the light in the hall",
        "Turn off the light in the kitchen, then turn on the light in the hall",
    ),
    ("Is x < y?", "Is x > y?"),
    ("Is a <= b?", "Is a < b?"),
    ("Remove the first paragraph and keep the last", "Keep the first paragraph and remove the last"),
    ("Can the patient eat before the operation?", "Must the patient eat before the operation?"),
    (
        "Can you give me a vegetarian recipe with lentils, rice, onions and a lot of garlic?",
        "Can you give me a vegan recipe with lentils, rice, onions and a lot of garlic?",
    ),
    ("Show me shoes for men", "Show me red shoes for men"),
    ("Does it ever snow in Cairo?", "Does it often snow in Cairo?"),
    (
        "What does the function f return for an empty list when the flag is set in the configuration?",
        "What does the function f return for a full list when the flag is set in the configuration?",
    ),
    ("I am allergic to nuts. What can I eat?", "I am allergic to fish. What can I eat?"),
    ("Should I buy or sell the shares now?", "Should I sell or buy the shares now? No, only buy?"),
    ("is iOS 17 better than iOS 16", "is iOS 16 better than iOS 17"),
    ("call mr miller", "call mr muller"),
    ("who is older, anna or ben", "who is older, anna or bea"),
    (
        "What is the capital of the country to the north of Austria, and how many live there?",
        "What is the capital of the country to the south of Austria, and how many live there?",
    ),
]


@pytest.mark.parametrize(("one", "other"), THE_SAME)
def test_manners_do_not_matter(one: str, other: str) -> None:
    assert may_share_an_answer(one, other) and may_share_an_answer(other, one)
    assert overlap(one, other) >= 0.9


@pytest.mark.parametrize(("one", "other"), [*NEAR_MISSES, *ONE_WORD, *MORE_NEAR_MISSES])
def test_near_misses_never_share_an_answer(one: str, other: str) -> None:
    assert not (may_share_an_answer(one, other) and overlap(one, other) >= 0.9)
    assert not (may_share_an_answer(other, one) and overlap(other, one) >= 0.9)


def test_the_guard_alone() -> None:
    """The rates that docs/memory.md gives: of near misses stopped and of same questions let through."""
    near = [*NEAR_MISSES, *ONE_WORD, *MORE_NEAR_MISSES]
    assert len(near) == 73 and sum(may_share_an_answer(*pair) for pair in near) == 2
    assert all(may_share_an_answer(*pair) for pair in [*THE_SAME, *REWORDED])


def test_rewording_needs_an_encoder() -> None:
    assert all(overlap(*pair) < 0.9 for pair in REWORDED)


def test_overlap_is_a_share() -> None:
    assert overlap("", "") == 0 and overlap("boats", "boats") == 1 and 0 < overlap("red boats", "blue boats") < 1
