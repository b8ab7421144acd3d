"""A draft model changes when tokens come, never which ones; and it never blocks a request."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.contract import Batch, Output
from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.core import EngineCore
from mnemos.engine.draft_model import DraftModel
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.scheduler import Limits
from mnemos.errors import ConfigError, RequestError
from tests.engine.drivers import Toy, check_pages, check_whole, make_request, reserve_toy, run
from tests.engine.toys import VOCABULARY, ToyModel, toy_greedy


class Unsure(ToyModel):
    """A draft model that is wrong at every position divisible by `wrong`."""

    def __init__(self, wrong: int = 3, **options: int) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.wrong = wrong

    def forward(self, batch: Batch) -> Output:
        output = super().forward(batch)
        output.logits[batch.positions[batch.logit_rows] % self.wrong == 0] *= -1
        return output


def core_with(model: Toy, draft: Toy, pages: int = 400, draft_pages: int = 400) -> EngineCore:
    limits = Limits(model.spec.context_length, 64, 16)
    draft_model = DraftModel(draft, reserve_toy(draft, draft_pages), Limits(draft.spec.context_length, 64, 16))
    return EngineCore(model, reserve_toy(model, pages), limits, True, draft_model)


def add(core: EngineCore, prompt: list[int], **settings: object) -> list[list[int]]:
    config = GenerationConfig(speculative="draft", **settings)  # type: ignore[arg-type]
    request, results = make_request(make_strategy(config, prompt, None, core.model.spec), prompt)
    core.add(request)
    return results  # type: ignore[return-value]


def check_drafts_whole(core: EngineCore) -> None:
    assert core.draft_model is not None
    scheduler = core.draft_model.scheduler
    assert not scheduler.running
    assert not len(scheduler.queue)
    (pool,) = scheduler.tables.pools
    assert pool.free + pool.reclaimable == pool.total


PROMPTS = [[3 + i, *range(1, 4 + 7 * i)] for i in range(9)]


@pytest.mark.parametrize(
    "draft",
    [ToyModel(), Unsure(2), Unsure(5), Unsure(1), ToyModel(page_size=8)],
    ids=["sure", "wrong at 2", "wrong at 5", "always wrong", "other pages"],
)
def test_greedy_texts_are_those_without_drafts(draft: ToyModel) -> None:
    model = ToyModel()
    core = core_with(model, draft)
    results = [add(core, prompt, max_new_tokens=40) for prompt in PROMPTS]
    run(core)
    assert [r.tokens for r in results] == [[toy_greedy(prompt, 40)] for prompt in PROMPTS]  # type: ignore[attr-defined]
    check_whole(core)
    check_drafts_whole(core)


def test_a_right_draft_saves_steps_and_is_counted() -> None:
    core = core_with(ToyModel(), ToyModel())
    result = add(core, PROMPTS[1], max_new_tokens=60, draft_tokens=8)
    run(core)
    assert result.tokens == [toy_greedy(PROMPTS[1], 60)]  # type: ignore[attr-defined]
    counters = core.counters
    assert counters.steps < 20
    assert counters.drafted == counters.accepted > 40


def test_useless_drafts_are_given_up() -> None:
    core = core_with(ToyModel(), Unsure(1))
    add(core, PROMPTS[1], max_new_tokens=200)
    run(core)
    assert core.counters.accepted == 0
    assert core.counters.drafted < 20


def test_drafts_of_many_requests_are_one_batch() -> None:
    draft = ToyModel()
    core = core_with(ToyModel(), draft)
    for prompt in PROMPTS[:6]:
        add(core, prompt, max_new_tokens=30)
    run(core)
    assert sum(batch.sequences for batch in draft.batches) > 3 * len(draft.batches)


@pytest.mark.parametrize("n", [1, 3])
def test_sampled_texts_are_those_without_drafts(n: int) -> None:
    settings = {"max_new_tokens": 40, "temperature": 0.4, "n": n, "seed": 5}
    with InferenceEngine(ToyModel(), draft_model=Unsure(4)) as engine:
        for prompt in PROMPTS:
            drafted = engine.complete(prompt, speculative="draft", **settings)
            plain = engine.complete(prompt, **settings)
            assert [c.token_ids for c in drafted.choices] == [c.token_ids for c in plain.choices]
        assert engine.stats().acceptance_rate > 0


def test_few_pages_for_drafts_preempt_copies_only() -> None:
    core = core_with(ToyModel(), Unsure(7), draft_pages=14)
    results = [add(core, prompt, max_new_tokens=30) for prompt in PROMPTS]
    for _ in range(1000):
        if not core.has_work:
            break
        core.step()
        check_pages(core)
    assert [r.tokens for r in results] == [[toy_greedy(prompt, 30)] for prompt in PROMPTS]  # type: ignore[attr-defined]
    assert core.scheduler.preemptions == 0
    check_drafts_whole(core)


def test_few_pages_for_the_texts_preempt_them_and_lose_nothing() -> None:
    core = core_with(ToyModel(), Unsure(7), pages=40)
    results = [add(core, prompt, max_new_tokens=30) for prompt in PROMPTS]
    run(core)
    assert [r.tokens for r in results] == [[toy_greedy(prompt, 30)] for prompt in PROMPTS]  # type: ignore[attr-defined]
    assert core.scheduler.preemptions > 0
    check_whole(core)
    check_drafts_whole(core)


def test_beyond_the_draft_models_context_texts_go_on_alone() -> None:
    core = core_with(ToyModel(), ToyModel(context_length=32))
    result = add(core, PROMPTS[2], max_new_tokens=100)
    run(core)
    assert result.tokens == [toy_greedy(PROMPTS[2], 100)]  # type: ignore[attr-defined]
    check_drafts_whole(core)


def test_a_draft_model_that_fails_harms_nobody() -> None:
    draft = ToyModel()
    core = core_with(ToyModel(), draft)
    results = [add(core, prompt, max_new_tokens=30) for prompt in PROMPTS[:4]]
    for _ in range(4):
        core.step()
    draft.fail_on = toy_greedy(PROMPTS[2], 30)[12]
    run(core)
    assert [r.tokens for r in results] == [[toy_greedy(p, 30)] for p in PROMPTS[:4]]  # type: ignore[attr-defined]
    check_whole(core)
    check_drafts_whole(core)


def test_cancelled_requests_give_both_models_pages_back() -> None:
    core = core_with(ToyModel(), ToyModel())
    for prompt in PROMPTS:
        add(core, prompt, max_new_tokens=100)
    for _ in range(5):
        core.step()
    for request in core.requests:
        core.cancel(request)
    check_whole(core)
    check_drafts_whole(core)


def test_what_cannot_be_drafted_is_refused() -> None:
    with InferenceEngine(ToyModel()) as engine, pytest.raises(RequestError, match="draft_model"):
        engine.complete([1, 2, 3], speculative="draft")
    other = ToyModel()
    other.spec = type(other.spec)(**{**vars(other.spec), "vocabulary_size": VOCABULARY + 1})
    with pytest.raises(ConfigError, match=rf"{VOCABULARY + 1} tokens and the model one of {VOCABULARY}"):
        InferenceEngine(ToyModel(), draft_model=other)


def test_the_distribution_of_samples_is_unchanged() -> None:
    """The second tokens, which are the first drafted ones, are as frequent as the model says, by a chi-square test."""
    prompt = [5, 6, 7]
    with InferenceEngine(ToyModel(), draft_model=Unsure(2)) as engine:
        first = softmax(engine.logits(prompt)[-1])
        expected = sum(p * softmax(engine.logits([*prompt, token])[-1]) for token, p in enumerate(first) if p > 1e-9)
        settings = {"temperature": 1.0, "n": 32, "max_new_tokens": 3}
        runs = [engine.complete(prompt, speculative="draft", seed=seed, **settings) for seed in range(40)]
        assert engine.stats().drafted_tokens > 500
    tokens = [choice.token_ids[1] for one in runs for choice in one.choices]
    counts = np.bincount(tokens, minlength=VOCABULARY)
    frequent = expected * len(tokens) > 5
    statistic = ((counts - len(tokens) * expected)[frequent] ** 2 / (len(tokens) * expected[frequent])).sum()
    assert statistic < frequent.sum() + 4 * np.sqrt(2 * frequent.sum())


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()
