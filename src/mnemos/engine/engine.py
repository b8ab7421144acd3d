"""The engine that a user holds: prompts in, texts, tokens and scores out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, overload

import numpy as np

from mnemos.contract import ConditionedModel, PagedModel
from mnemos.engine.completion import Completion, StreamedToken
from mnemos.engine.counters import Listener
from mnemos.engine.handle import RequestHandle, run_all
from mnemos.engine.launching import Launcher
from mnemos.engine.options import GIGABYTES, EngineOptions, split
from mnemos.engine.padding import filling_id, padding_id
from mnemos.engine.prepare import default_length, make_draft_model, room_for_pages, take_model, with_context, with_ends
from mnemos.engine.pretrained import load_parts
from mnemos.engine.prompts import Prompts, listed, read_prompts
from mnemos.errors import ConfigError, RequestError
from mnemos.memory.capacity import reserve
from mnemos.rules import COUNT
from mnemos.text.foreign import adapt_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mnemos.contract import Floats
    from mnemos.decoding.config import AnyConfig, GenerationConfig
    from mnemos.decoding.forced import Score
    from mnemos.decoding.options import Likelihood
    from mnemos.engine.answers import AnswerEvent
    from mnemos.engine.chat import ChatCompletion, ChatHandle
    from mnemos.engine.decide import Decision
    from mnemos.engine.options import EngineKeywords, LoadKeywords
    from mnemos.engine.pacing import Pacer
    from mnemos.engine.recall import SemanticMemory
    from mnemos.engine.session import Session
    from mnemos.engine.sessions import Sessions
    from mnemos.engine.statistics import Statistics
    from mnemos.engine.value_handle import ValueHandle
    from mnemos.errors import FormatError
    from mnemos.machine.sensors import Sensors
    from mnemos.memory.session_records import Summary
    from mnemos.text.tokenizer import Tokenizer

    Config = AnyConfig | None

DEFAULT_BATCHED_TOKENS = 128
LENGTHS = {"max_new_tokens", "max_length", "max_tokens", "generation_config"}  # what limits a text's length


class Shaped(Protocol):
    """An array or a tensor."""

    @property
    def shape(self) -> Any:
        """Its sizes."""


Array = TypeVar("Array", bound=Shaped)


class InferenceEngine:
    """Runs a model for any number of callers at once. Safe to use from many threads; a context manager.

    model: a `Model`, or an nn.Module, which is adapted: `device` moves the module itself there, and with
    `use_kv_cache=False` it runs over the whole text for every token.
    tokenizer: a `mnemos.Tokenizer`, or any object with encode(text) and decode(ids), like those of transformers.
    generation_config: the config of requests that pass none, or None.
    options: those of `mnemos.engine.options.EngineOptions`, which documents them. ConfigError for any other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        device: str | None = None,
        use_kv_cache: bool = True,
        **options: Unpack[EngineKeywords],
    ) -> None:
        chosen = EngineOptions.read({"device": device, "use_kv_cache": use_kv_cache, **options})
        # Imported here, while the weights that `from_pretrained` loads are being read.
        import mnemos.decoding.build  # noqa: F401  the first request needs it
        from mnemos.engine.scheduler import Limits
        from mnemos.engine.thread import EngineThread

        self.tokenizer: Tokenizer | None = adapt_tokenizer(tokenizer)
        self.model = take_model(model, self.tokenizer, chosen)
        self.spec = with_context(with_ends(self.model.spec, self.tokenizer), chosen.context_length)
        self.generation_config = chosen.generation_config
        self.max_sequences = chosen.max_sequences
        limits = Limits(self.spec.context_length, chosen.max_batch_tokens, chosen.max_sequences)
        room = None
        if chosen.max_memory_gb is not None:
            room = room_for_pages(chosen.max_memory_gb, self.model, limits)
        capacity = reserve(self.model, self.spec, chosen.cache_tokens, limits.sequences, limits.batch_tokens, room)
        drafts = None
        if chosen.draft_model is not None:
            drafts = make_draft_model(chosen, self.spec, limits)
        self._thread = EngineThread(self.model, capacity, limits, chosen.prefix_cache, chosen.queue_size, drafts)
        self._limits, self._most_bytes = limits, int((chosen.max_memory_gb or 0) * 2**30)
        if self._most_bytes or chosen.performance_mode or chosen.thermal_throttle:
            self.pace(chosen.performance_mode, chosen.thermal_throttle)
        self._launcher = Launcher(self.model, self.spec, self.tokenizer, self._thread, chosen.response_cache)
        self.session_dir = chosen.session_dir
        if self.spec.first_logits is not None:
            from mnemos.engine.first_logits import check_first_logits

            try:
                check_first_logits(self.logits, self.spec)
            except BaseException:
                self.close()
                raise

    @cached_property
    def _sessions(self) -> Sessions:
        from mnemos.engine.sessions import Sessions

        return Sessions(
            self.model,
            self.spec,
            self.tokenizer,
            self._launcher,
            self._thread,
            self.session_dir,
            self.generation_config,
        )

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Unpack[LoadKeywords]) -> InferenceEngine:
        """An engine for a registry name, a GGUF file, a Hugging Face folder, a training checkpoint (.pt) or a package.

        options: those of `mnemos.engine.options.LoadOptions` and `EngineOptions`, which document them. ConfigError for
        any other, and for one that the model cannot use.

        A folder with an architecture that is not built in runs through transformers, if that is installed, on the best
        device unless one is named; code in the folder is run with trust_remote_code=True only.
        backend="transformers" requests that for built-in architectures too.
        """
        loading, running = split(options)
        return cls(**load_parts(source, loading), **running)

    # Generation.

    @overload
    def generate(
        self, prompts: list[int], attention_mask: AnyConfig, config: None = ..., **overrides: Any
    ) -> list[list[int]]: ...
    @overload
    def generate(self, prompts: str, attention_mask: Any = ..., config: Config = ..., **overrides: Any) -> str: ...
    @overload
    def generate(
        self, prompts: list[str], attention_mask: Any = ..., config: Config = ..., **overrides: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompts: list[int], attention_mask: Any = ..., config: Config = ..., **overrides: Any
    ) -> list[int]: ...
    @overload
    def generate(
        self, prompts: list[list[int]], attention_mask: Any = ..., config: Config = ..., **overrides: Any
    ) -> list[list[int]]: ...
    @overload
    def generate(self, prompts: Array, attention_mask: Any = ..., config: Config = ..., **overrides: Any) -> Array: ...
    @overload
    def generate(
        self, prompts: Any = None, attention_mask: Any = ..., config: Config = ..., **overrides: Any
    ) -> Any: ...

    def generate(
        self,
        prompts: Any = None,
        attention_mask: Any = None,
        config: Config = None,
        *,
        input_ids: Any = None,
        **overrides: Any,
    ) -> Any:
        """Returns results in the form of the prompts.

        config, or generation_config: a GenerationConfig, a dict of its fields, or transformers' GenerationConfig, as
        everywhere where a config is taken.

        A text gives a text, a list of texts a list; token ids give token ids, and an array or tensor (batch, time)
        gives such an array, both including the prompt as it was given, so that out[:, ids.shape[1]:] is what was
        generated; rows that end early are filled up with pad_token_id. In arrays without a mask, pad_token_id marks
        padding unless it also ends texts. Arrays of less than 32 bits give int64. With n results per
        prompt, lists hold a list for each prompt and arrays have n rows for it, which the annotated types do not show.
        The output of a transformers tokenizer is accepted too, as the prompts or as generate(**inputs). `overrides`
        replace fields of the config. The config may also be passed in the position of attention_mask: then
        generate(ids, config) always returns a batch, for one list of token ids a list with one row. For an
        encoder-decoder model, results hold only the decoder's tokens.
        """
        from mnemos.decoding.config import is_config

        as_batch = is_config(attention_mask)
        if as_batch:
            attention_mask, config = None, attention_mask
        if input_ids is not None:
            if prompts is not None:
                raise RequestError("prompts and input_ids are both given; give one of them")
            prompts = input_ids
            overrides.pop("token_type_ids", None)  # of models that read two texts
        config = self._config(config, overrides)
        wanted = self._read(prompts, attention_mask, config)
        results = self._formed(wanted, self._launcher.complete(wanted.token_ids, config), config)
        if not wanted.single or (as_batch and config.num_return_sequences == 1 and not isinstance(prompts, str)):
            return results
        return results[0]

    def generate_batched(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int | None = None,
        batch_size: int = 4,
        config: AnyConfig | Sequence[AnyConfig] | None = None,
        *,
        on_done: Callable[[], None] = lambda: None,
        **overrides: Any,
    ) -> list[Any]:
        """`generate` for many prompts, at most `batch_size` at once; when one is done, the next starts.

        Each result has the form of its own prompt; for an array or tensor (time,), it is such an array. `config` is one
        for all prompts or a list with one for each. Without a config and a length, 128 tokens are generated, or what
        the context has room for. `on_done` is called after each prompt.
        """
        COUNT.apply("batch_size", batch_size)
        if max_new_tokens is not None:
            overrides["max_new_tokens"] = max_new_tokens
        elif config is None and self.generation_config is None and not LENGTHS & overrides.keys():
            overrides |= default_length(DEFAULT_BATCHED_TOKENS, overrides, self.spec)
        wanted = listed(prompts)
        given: list[Any] = list(config) if isinstance(config, (list, tuple)) else [config] * len(wanted)
        if len(given) != len(wanted):
            raise ConfigError(f"config is a list of {len(given)}; expected one for each of the {len(wanted)} prompts")
        configs = [self._config(one, overrides) for one in given]
        readings = [self._read(prompt, None, one) for prompt, one in zip(wanted, configs, strict=True)]
        self._thread.check_thread()
        launches = [self._launcher.prepare(reading.only, one) for reading, one in zip(readings, configs, strict=True)]
        completions = run_all(launches, batch_size, on_done)
        return [
            result[0] if isinstance(result := self._formed(reading, [completion], one), list) else result
            for reading, completion, one in zip(readings, completions, configs, strict=True)
        ]

    @overload
    def complete(self, prompts: str | list[int], config: Config = ..., **overrides: Any) -> Completion: ...
    @overload
    def complete(
        self, prompts: list[str] | list[list[int]], config: Config = ..., **overrides: Any
    ) -> list[Completion]: ...
    @overload
    def complete(self, prompts: Any, config: Config = ..., **overrides: Any) -> Any: ...

    def complete(self, prompts: Any, config: Config = None, **overrides: Any) -> Any:
        """A `Completion` for one prompt (a text or token ids), or a list of them for several."""
        config = self._config(config, overrides)
        wanted = self._read(prompts, None, config)
        completions = self._launcher.complete(wanted.token_ids, config)
        return completions[0] if wanted.single else completions

    def stream(self, prompt: Any, config: Config = None, **overrides: Any) -> Iterator[StreamedToken]:
        """The tokens of one prompt's results as they become final. Ending the iteration early cancels the request."""
        return iter(self.submit(prompt, config, **overrides))

    def submit(self, prompt: Any, config: Config = None, **overrides: Any) -> RequestHandle:
        """Queues one prompt and returns immediately; CapacityError if the queue is full."""
        config = self._config(config, overrides)
        return self._launcher.prepare(self._read(prompt, None, config).only, config)()

    # Conversations.

    def chat(self, messages: Any, config: Config = None, **options: Any) -> ChatCompletion:
        """The answer to a conversation: its text, its reasoning and its tool calls; `options` as in `submit_chat`."""
        return self.submit_chat(messages, config, **options).result()

    def stream_chat(self, messages: Any, config: Config = None, **options: Any) -> Iterator[AnswerEvent]:
        """The events of the answer (see `mnemos.engine.answers`) as they arrive; `options` as in `submit_chat`."""
        return iter(self.submit_chat(messages, config, **options))

    def submit_chat(
        self,
        messages: Any,
        config: Config = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool | None = None,
        continue_final_message: bool | None = None,
        thinking: bool | None = None,
        thinking_token_budget: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> ChatHandle:
        """Queues a conversation and returns immediately; CapacityError if the queue is full.

        messages: [{"role", "content"}, ...], as OpenAI's clients have them. tools: functions that may be called, in
        OpenAI's form; tool_choice: none, auto, required, or the name of the tool that must be called, which a grammar
        enforces. parallel_tool_calls: several in one answer, by default unless a call is forced.
        continue_final_message: the answer continues the last message, by default if it is the assistant's. thinking:
        whether the model reasons first, by default as its template has it. thinking_token_budget: most tokens of
        reasoning. chat_template_kwargs: variables of the chat template. Without a length, an answer may fill the
        context. RequestError for messages or tools that are wrong, UnsupportedError for a tokenizer without templates.
        """
        from mnemos.engine.chat import ChatHandle, check_tokenizer, read_chat

        options = {
            "tools": tools,
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "continue_final_message": continue_final_message,
            "thinking": thinking,
            "thinking_token_budget": thinking_token_budget,
            "chat_template_kwargs": chat_template_kwargs,
        }
        chosen = self._config(config, overrides)
        conversation, read, chosen = read_chat(messages, check_tokenizer(self.tokenizer), self.spec, chosen, options)
        return ChatHandle(self._launcher.prepare(read.prompt_ids, chosen, conversation.question)(), read)

    # Sessions.

    def session(self, name: str, *, tenant: str = "") -> Session:
        """The session of this name, which continues where it was left, or a new one; see `mnemos.engine.session`.

        It is kept in the engine's `session_dir`, in a folder of its own for each tenant. CapacityError if another
        process has it open, FormatError if its file is damaged or was made by another model, ConfigError for a name
        that no session can have.
        """
        return self._sessions.open(name, tenant)

    def sessions(self, *, tenant: str = "") -> list[Summary | FormatError]:
        """What there is to say about all sessions, the most recently used first; unreadable files at the end."""
        return self._sessions.list(tenant)

    def forget_session(self, name: str, *, tenant: str = "") -> None:
        """Deletes a session, also one that is damaged or of another model. FormatError if there is none."""
        self._sessions.forget(name, tenant)

    @cached_property
    def memory(self) -> SemanticMemory:
        """What the engine finds again by its words: stored texts, and its sessions; see `mnemos.engine.recall`."""
        from mnemos.engine.recall import SemanticMemory
        from mnemos.memory.session_folder import session_folder

        return SemanticMemory(self._sessions, session_folder(self.session_dir), self.tokenizer)

    # Evaluation of given tokens.

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """float32 (time, vocabulary): row i holds the logits of the token after token i (of a text, if given)."""
        from mnemos.decoding.forced import ForcedLogits

        strategy = ForcedLogits(self.spec.vocabulary_size)
        self._launcher.force([read_prompts(token_ids, None, self.tokenizer).only], [strategy])
        return strategy.logits

    def score(self, texts: Any) -> list[Score]:
        """Log likelihoods of texts (or token ids), each token given those before it; the first is not scored."""
        from mnemos.decoding.forced import ForcedScore

        wanted = read_prompts(texts, None, self.tokenizer)
        for token_ids in wanted.token_ids:
            if len(token_ids) < 2:
                raise RequestError(f"the text has {len(token_ids)} token; scoring needs at least 2")
        strategies = [ForcedScore() for _ in wanted.token_ids]
        self._launcher.force(wanted.token_ids, strategies)
        return [strategy.score for strategy in strategies]

    def embed(self, texts: Any, pooling: str = "mean", normalize: bool = True) -> Floats:
        """Embeddings of texts (or token ids): float32 (texts, hidden size), for one text (hidden size,).

        pooling: "mean" of the last hidden states (after the model's last norm) of all tokens, or the "last" token's.
        normalize: to length 1. UnsupportedError for a model that shows no hidden states.
        """
        from mnemos.decoding.forced import ForcedEmbedding
        from mnemos.engine.embedding import check_embedding

        wanted = read_prompts(texts, None, self.tokenizer)
        check_embedding(self.spec, pooling)
        strategies = [ForcedEmbedding(pooling, normalize) for _ in wanted.token_ids]
        self._launcher.force(wanted.token_ids, strategies)
        embeddings = np.stack([strategy.embedding for strategy in strategies])
        return embeddings[0] if wanted.single else embeddings

    def submit_embedding(
        self, text: Any, pooling: str = "mean", normalize: bool = True, **scheduling: Any
    ) -> ValueHandle[Floats]:
        """Queues one text's embedding and returns immediately; CapacityError if the queue is full.

        scheduling: priority, tenant, deadline, cache_salt and adapter, as in GenerationConfig.
        """
        from mnemos.decoding.config import GenerationConfig
        from mnemos.decoding.forced import ForcedEmbedding
        from mnemos.engine.embedding import check_embedding
        from mnemos.engine.value_handle import ValueHandle

        config, prompt = GenerationConfig(**scheduling), read_prompts(text, None, self.tokenizer).only
        check_embedding(self.spec, pooling)
        strategy = ForcedEmbedding(pooling, normalize)
        handle = self._launcher.prepare_forced(strategy, prompt, config)()
        return ValueHandle(handle, "embedding", lambda usage: strategy.embedding)

    def decide(self, input: Any, questions: Any) -> Any:
        """Answers typed questions about an input with probabilities, without generating text.

        input: a text, or messages. questions: one `Predicate`, `Choice` or `Score` of `mnemos.engine.decide` (or a
        mapping with type, instructions and criteria), a list of them, or a mapping by name; `Decision`s come back in
        the same form. The input is evaluated once; every option is a row of the same batch.
        """
        one = not isinstance(questions, (list, tuple)) and not (
            isinstance(questions, Mapping) and "type" not in questions
        )
        named = dict(questions) if isinstance(questions, Mapping) and not one else None
        wanted = [questions] if one else list(named.values()) if named is not None else list(questions)
        handles = [self.submit_decision(input, question) for question in wanted]
        answers = [handle.result() for handle in handles]
        return answers[0] if one else dict(zip(named, answers, strict=True)) if named is not None else answers

    def submit_decision(self, input: Any, question: Any, **scheduling: Any) -> ValueHandle[Decision]:
        """Queues one question and returns immediately; CapacityError if the queue is full.

        scheduling: priority, tenant, deadline, cache_salt and adapter, as in GenerationConfig.
        """
        from mnemos.decoding.config import GenerationConfig
        from mnemos.decoding.options import ForcedOptions
        from mnemos.engine.decide import decision, option_ids, prompt_of, question_of
        from mnemos.engine.value_handle import ValueHandle

        if self.tokenizer is None:
            raise RequestError("the engine has no tokenizer; decisions are about texts")
        question = question_of(question, "question")
        prompt, options = prompt_of(self.tokenizer, input, question), option_ids(self.tokenizer, question)
        strategy = ForcedOptions(options, self.spec.rewinds)
        longest = max(map(len, options))
        config = GenerationConfig(**scheduling)
        handle = self._launcher.prepare_forced(strategy, prompt, config, longest)()
        return ValueHandle(handle, "decision", partial(decision, question, strategy))

    def submit_likelihoods(
        self, prompt: Any, options: Sequence[Sequence[int]], **scheduling: Any
    ) -> ValueHandle[list[Likelihood]]:
        """Queues the likelihoods of continuations of one prompt, which is read once, and returns immediately.

        prompt: a text or token ids. options: the token ids of each continuation; RequestError for one without any.
        scheduling: priority, tenant, deadline, cache_salt and adapter, as in GenerationConfig.
        """
        from mnemos.decoding.config import GenerationConfig
        from mnemos.decoding.options import ForcedOptions
        from mnemos.engine.value_handle import ValueHandle

        if not options or not all(options):
            raise RequestError("options has one without tokens, or none; expected continuations of at least 1 token")
        strategy, config = ForcedOptions(options, self.spec.rewinds), GenerationConfig(**scheduling)
        token_ids = read_prompts(prompt, None, self.tokenizer).only
        handle = self._launcher.prepare_forced(strategy, token_ids, config, max(map(len, options)))()
        return ValueHandle(handle, "likelihoods", lambda usage: strategy.likelihoods)

    # The engine itself.

    def stats(self) -> Statistics:
        """A snapshot of the engine's work, past and present."""
        return self._thread.statistics()

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with an Event for every change in a request's life; returns a function that ends this.

        It is called in the engine's thread and must be quick; its exceptions end its subscription.
        """
        return self._thread.subscribe(listener)

    def save_prefix_cache(self, path: str | os.PathLike[str]) -> int:
        """Writes the prefix cache to a file that only this model can load; returns the number of pages."""
        from mnemos.memory.prefix_file import save_prefixes

        tree = self._thread.prefix_tree()
        return self._thread.call(lambda: save_prefixes(path, tree, cast(PagedModel, self.model).cache, self.spec))

    def load_prefix_cache(self, path: str | os.PathLike[str]) -> int:
        """Loads a file that save_prefix_cache wrote, as far as pages are free; returns the number of pages.

        FormatError if the file is damaged or belongs to another model; nothing is changed then.
        """
        from mnemos.memory.prefix_file import load_prefixes

        tree = self._thread.prefix_tree()
        return self._thread.call(lambda: load_prefixes(path, tree, cast(PagedModel, self.model).cache, self.spec))

    def clear_prefix_cache(self) -> None:
        """Drops the keys and values cached from earlier requests."""
        tree = self._thread.prefix_tree()
        self._thread.call(tree.clear)

    def limit_prefix_cache(self, pages: int, weighted: bool = False) -> None:
        """Keeps at most `pages` cache pages that no request uses: the most recently used ones.

        weighted: those that were used often stay longer, so that many single texts do not drive them out.
        """
        tree = self._thread.prefix_tree()
        self._thread.call(partial(tree.restrict, pages, weighted))

    def pace(
        self,
        mode: str | None = None,
        thermal_throttle: bool = False,
        *,
        max_memory_gb: float | None = None,
        sensors: Sensors | None = None,
    ) -> Pacer:
        """Has the engine use as much of the machine from now on as a performance mode, its heat and power leave it.

        mode: performance, balanced (as many threads as performance cores) or efficiency (half of the threads and the
        batch); None: balanced with `thermal_throttle`, else performance. thermal_throttle: fewer threads, smaller
        batches and pauses while the machine is hot or on battery. max_memory_gb: of the process, by default the
        engine's own limit; beyond it, cached prefixes are given up and few requests run at once. sensors: by default
        the machine's. Texts stay the same; only the time changes. The result tells the conditions and what is allowed.
        """
        from mnemos.engine.pacing import make_pacer

        if max_memory_gb is not None:
            self._most_bytes = int(GIGABYTES.apply("max_memory_gb", max_memory_gb) * 2**30)
        core = self._thread.core
        drafts = None if core.draft_model is None else core.draft_model.model
        core.pacer = pacer = make_pacer(
            self.model, self._limits, mode, thermal_throttle, self._most_bytes, sensors, drafts=drafts
        )
        return pacer

    def close(self, drain: bool = False) -> None:
        """Closes the engine: with `drain` once all requests are done, else immediately, ending them with an error."""
        self._thread.close(drain)
        if "_sessions" in self.__dict__:
            self._sessions.close()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(drain=exception[0] is None)

    # Internals.

    def _config(self, config: Config, overrides: Mapping[str, Any]) -> GenerationConfig:
        """What a request is generated by: its own config, else the engine's, with some fields replaced."""
        from mnemos.decoding.config import choose_config

        return choose_config(config, self.generation_config, **overrides)

    def _read(self, prompts: Any, attention_mask: Any, config: GenerationConfig) -> Prompts:
        padding = partial(padding_id, config, self.spec, self.tokenizer)
        return read_prompts(prompts, attention_mask, self.tokenizer, padding, config.bos_token_id)

    def _formed(self, wanted: Prompts, completions: list[Completion], config: GenerationConfig) -> Any:
        """The results in the form of the prompts."""
        filler = filling_id(config, self.spec, self.tokenizer)
        return wanted.results(completions, filler, apart=isinstance(self.model, ConditionedModel))
