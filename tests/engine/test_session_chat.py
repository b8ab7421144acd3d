"""Conversations in a session: the same answers as with all messages resent, and almost nothing read again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnemos.engine.answers import End, Piece
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import RequestError

SYSTEM = {"role": "system", "content": "You answer in one short sentence, and never repeat what was said before."}
QUESTIONS = ["Name three colours of the rainbow.", "Which of them has the longest waves?", "And why is that?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def engine(smollm2: Path, folder: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(smollm2, context_length=1024, session_dir=folder) as made:
        yield made


def test_a_conversation_continues_without_its_past(engine: InferenceEngine, smollm2: Path, folder: Path) -> None:
    messages: list[dict[str, Any]] = [SYSTEM]
    session = engine.session("colours")
    session.append(SYSTEM)
    for question in QUESTIONS[:2]:
        messages.append({"role": "user", "content": question})
        answer = session.chat(question, max_new_tokens=16)
        assert answer.text == engine.chat(messages, max_new_tokens=16).text
        messages.append(answer.message)
        assert session.messages == messages
    session.close()
    engine.clear_prefix_cache()
    messages.append({"role": "user", "content": QUESTIONS[2]})
    with InferenceEngine.from_pretrained(smollm2, context_length=1024, session_dir=folder) as another:
        again = another.session("colours")
        turn = again.submit_chat(QUESTIONS[2], max_new_tokens=16)
        answer = turn.result()
        assert answer.text == engine.chat(messages, max_new_tokens=16).text
        assert answer.usage.prompt_tokens - answer.usage.cached_tokens < 64 <= answer.usage.cached_tokens
        assert again.messages == [*messages, answer.message] and again.turns == 4
        again.rewind()
        assert again.messages == messages[:-1]


def test_events_and_a_continued_answer(engine: InferenceEngine) -> None:
    session = engine.session("stream")
    events = list(session.stream_chat(QUESTIONS[0], max_new_tokens=12))
    text = "".join(event.text for event in events if isinstance(event, Piece))
    assert isinstance(events[-1], End) and session.messages[-1] == {"role": "assistant", "content": text}
    session.rewind()
    begun = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": "The colours are red, orange and"},
    ]
    answer = session.chat(begun, max_new_tokens=4)
    assert "yellow" in answer.text
    assert session.messages == [begun[0], {"role": "assistant", "content": begun[1]["content"] + answer.text}]


def test_texts_and_conversations_do_not_mix(engine: InferenceEngine) -> None:
    session = engine.session("chat")
    session.chat(QUESTIONS[0], max_new_tokens=2)
    with pytest.raises(RequestError, match="'chat' is a conversation; use chat"):
        session.generate("And", max_new_tokens=2)
    with pytest.raises(RequestError, match="messages is empty"):
        session.chat([])
    with pytest.raises(RequestError, match="a conversation, which is rewound by turns"):
        session.rewind(tokens=3)
    text = engine.session("text")
    text.generate("Once upon a time", max_new_tokens=2)
    with pytest.raises(RequestError, match="'text' is a text, not a conversation"):
        text.chat("Hello")
    assert engine.generate("Once upon a time there was", max_new_tokens=8) == _going_on(engine)


def _going_on(engine: InferenceEngine) -> str:
    session = engine.session("joined")
    session.append("Once upon a time")
    return str(session.generate(" there was", max_new_tokens=8))
