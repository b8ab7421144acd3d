"""From a prompt and a config to a request of the engine's thread: checks, launches, and waiting for many at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from mnemos.contract import ConditionedModel, Model, ModelSpec
from mnemos.engine.handle import Channel, Lease, RequestHandle, run_all
from mnemos.engine.request import NO_ADAPTER, Request, State, Timings
from mnemos.errors import ContextLengthError, RequestError, UnsupportedError

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.decoding.memory import Memory
    from mnemos.decoding.prompt_scores import ScoredToken
    from mnemos.decoding.strategy import Strategy
    from mnemos.engine.completion import Completion
    from mnemos.engine.thread import EngineThread
    from mnemos.memory.response_cache import Cached, KeptAnswer, Question, ResponseCache
    from mnemos.text.tokenizer import Tokenizer

SMALLEST_SLIDING = 8  # the shortest context, in positions, in which endless generation works


class Launcher:
    """Puts requests into an engine's thread."""

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        thread: EngineThread,
        answers: ResponseCache | None = None,
    ) -> None:
        self.answers = answers
        self._fingerprint = spec.fingerprint or f"{spec.architecture} {os.urandom(16).hex()}"
        self._model = model
        self._spec = spec
        self._tokenizer = tokenizer
        self._thread = thread
        self._lease = Lease(thread)

    def prepare(
        self,
        token_ids: Sequence[int],
        config: GenerationConfig,
        question: Question | None = None,
        *,
        generates: bool = False,
    ) -> Callable[[], RequestHandle]:
        """Checks a request; returns a function that queues it. RequestError or ContextLengthError if it cannot run.

        question: what it asks, for a cache of answers. generates: it gets no answer from there.
        """
        from mnemos.decoding.lengths import fit_prompt

        spec = self._spec
        self._memory(config)
        if config.overflow == "sliding" and spec.context_length < SMALLEST_SLIDING:
            raise RequestError(
                f"overflow is 'sliding' and the context {spec.context_length}; it needs {SMALLEST_SLIDING}"
            )
        if config.speculative == "draft" and not self._thread.drafts:
            raise RequestError("speculative is 'draft' and the engine has no draft model; give it a draft_model")
        if config.speculative is not None and not spec.verifies_drafts:
            raise RequestError(
                f"speculative is {config.speculative!r}, and {spec.architecture} cannot verify drafts: the logits "
                "of several new tokens at once would not be those of one after the other; leave it out"
            )
        prompt = fit_prompt(config, token_ids, spec)
        if self.answers is not None and not generates:
            return self._prepare_kept(self.answers, prompt, config, question)
        return self._prepare(prompt, config)

    def _prepare_kept(
        self, answers: ResponseCache, prompt: list[int], config: GenerationConfig, question: Question | None
    ) -> Callable[[], RequestHandle]:
        """A request whose answer is taken from the cache, or put there."""
        found = answers.find(self._fingerprint, prompt, config, question)
        if found is not None:
            return partial(self._replay, prompt, config, *found)
        launch = self._prepare(prompt, config)

        def launch_and_keep() -> RequestHandle:
            handle = launch()
            handle.add_done_callback(partial(self._keep, answers, prompt, config, question, *handle.delivered()))
            return handle

        return launch_and_keep

    def _keep(
        self,
        answers: ResponseCache,
        prompt: list[int],
        config: GenerationConfig,
        question: Question | None,
        channel: Channel,
        scores: list[ScoredToken],
    ) -> None:
        """Called when a request has ended, which may not be disturbed by what cannot be kept."""
        from mnemos.memory.response_cache import KeptAnswer

        if channel.error is None:
            answers.keep(self._fingerprint, prompt, config, KeptAnswer(channel.items, scores), question)

    def _replay(self, prompt: list[int], config: GenerationConfig, answer: KeptAnswer, cached: Cached) -> RequestHandle:
        """The handle of a request whose answer is there already."""
        from mnemos.decoding.forced import ForcedReading

        now = time.perf_counter()
        channel = Channel()
        for emitted, finished in answer.deliveries:
            channel.deliver(emitted, finished)
        channel.end(None)
        times = Timings(now, now, now, [now] * channel.generated)
        request = Request(
            ForcedReading(),
            prompt,
            channel,
            times,
            skip_special=config.skip_special_tokens,
            prompt_scores=answer.prompt_scores,
            state=State.ENDED,
            cached_tokens=len(prompt),
        )
        return RequestHandle(self._lease, request, channel, self._tokenizer, cached)

    def _prepare(self, prompt: list[int], config: GenerationConfig) -> Callable[[], RequestHandle]:
        from mnemos.decoding.build import make_strategy

        spec, source = self._spec, None
        if isinstance(self._model, ConditionedModel):
            for field in ("prompt_logprobs", "guidance_scale"):
                if field in config.active:
                    raise UnsupportedError(
                        f"{field} is {getattr(config, field)}, and {spec.architecture} reads the prompt with an "
                        "encoder; it needs a model that continues its prompt"
                    )
            source, prompt = prompt, self._model.start_tokens(prompt)
        self._thread.check_length(len(prompt))
        strategy = make_strategy(config, prompt, self._tokenizer, spec, source)
        return partial(self._launch, strategy, prompt, config, source)

    def complete(self, prompts: list[list[int]], config: GenerationConfig) -> list[Completion]:
        """Runs all prompts and waits for them; all are checked before the first one runs."""
        self._thread.check_thread()
        return run_all([self.prepare(token_ids, config) for token_ids in prompts], self._thread.queue_size)

    def force(self, prompts: list[list[int]], strategies: Sequence[Strategy]) -> None:
        """Runs strategies that only evaluate their prompts, and waits for them. Errors: see `prepare_forced`."""
        from mnemos.decoding.config import GenerationConfig

        self._thread.check_thread()
        config, pairs = GenerationConfig(), zip(strategies, prompts, strict=True)
        run_all([self.prepare_forced(strategy, prompt, config) for strategy, prompt in pairs], self._thread.queue_size)

    def prepare_forced(
        self, strategy: Strategy, prompt: list[int], config: GenerationConfig, further: int = 0
    ) -> Callable[[], RequestHandle]:
        """`prepare` for a strategy that only evaluates its prompt; of the config, only scheduling counts.

        further: how many tokens the strategy evaluates after the prompt.

        UnsupportedError for a model with an encoder, ContextLengthError for a text that is too long.
        """
        from mnemos.decoding.lengths import fit_prompt

        spec = self._spec
        self._memory(config)
        if isinstance(self._model, ConditionedModel):
            raise UnsupportedError(
                f"{spec.architecture} has an encoder for its prompt; a text alone has no score and no embedding"
            )
        fit_prompt(config, prompt, spec)
        excess = len(prompt) + further - spec.context_length
        if excess > 0:
            raise ContextLengthError(
                f"the text has {len(prompt) + further} tokens, {excess} more than the context of {spec.context_length}"
            )
        return partial(self._launch, strategy, prompt, config)

    def _adapter(self, name: str | None) -> int:
        """The number of an adapter. RequestError for one that the model does not have."""
        if name is None:
            return NO_ADAPTER
        known = self._spec.adapters
        if name not in known:
            raise RequestError(f"adapter is {name!r}; the model has {', '.join(map(repr, known)) or 'no adapters'}")
        return known.index(name)

    def _memory(self, config: GenerationConfig) -> tuple[int, int, int] | None:
        """What rows see of a request's long text, None: as the engine's do. Errors if the engine cannot do that."""
        if config.memory is None:
            return None
        from mnemos.memory.policy import sizes_of

        sizes = sizes_of(self._spec, cast("Memory | Literal[False]", config.memory))
        if sizes is not None and config.overflow == "sliding":
            raise RequestError(
                f"overflow is 'sliding' and memory is {config.memory}; a text that drops its past has nothing to "
                "recall: leave one of them out"
            )
        return sizes

    def _launch(
        self,
        strategy: Strategy,
        prompt: list[int],
        config: GenerationConfig,
        source: list[int] | None = None,
    ) -> RequestHandle:
        now = time.perf_counter()
        channel = Channel()
        adapter, memory = self._adapter(config.adapter), self._memory(config)
        salt = config.cache_salt if config.adapter is None else f"{config.adapter}\n{config.cache_salt or ''}"
        if memory is not None:  # beyond what they all see, pages of texts that see different parts are different
            salt = f"memory {memory}\n{salt or ''}"
        request = Request(
            strategy,
            prompt,
            channel,
            Timings(now),
            priority=config.priority,
            tenant=config.tenant,
            salt=salt,
            adapter=adapter,
            memory=memory,
            deadline=None if config.deadline is None else now + config.deadline,
            sliding=config.overflow == "sliding",
            source=source,
            skip_special=config.skip_special_tokens,
            prompt_scores=_scores_of(strategy, config),
        )
        self._thread.submit(request)
        return RequestHandle(self._lease, request, channel, self._tokenizer)


def _scores_of(strategy: Strategy, config: GenerationConfig) -> list[ScoredToken]:
    """The list that the strategy fills with the scores of the prompt's tokens, if it was asked for them."""
    if config.prompt_logprobs is None:
        return []
    from mnemos.decoding.prompt_scores import ScoredPrompt

    return strategy.scores if isinstance(strategy, ScoredPrompt) else []
