"""Tasks of lm-evaluation-harness on an engine: the accuracies that papers report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError
from mnemos.text.tokenizer import Tokenizer

IN_FLIGHT = 32  # requests that the engine has at once
NEW_TOKENS = 256  # of a generated answer, where a task does not say
Progress = Callable[[str, int, int], None]  # (kind of request, done, total)


def run_tasks(
    engine: InferenceEngine,
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    folder: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The harness's results for the tasks of these names: metrics by task in "results".

    limit: only so many of each task's documents. shots: examples before each, by default the task's own number.
    folder: where further tasks are described in the harness's YAML files. Tasks may fetch their data from the Hugging
    Face Hub. ConfigError for a task that the harness does not know.
    """
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"tasks has {', '.join(map(repr, unknown))}, which lm-evaluation-harness does not know")
    found: dict[str, Any] = simple_evaluate(
        model=EngineLM(engine, tokenizer, progress),
        tasks=list(names),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return found


def table(found: dict[str, Any]) -> str:
    """The results as the harness prints them."""
    return str(make_table(found))


class EngineLM(LM):
    """An engine as the harness calls models. Requests run in batches; options of one context share its prefix."""

    def __init__(self, engine: InferenceEngine, tokenizer: Tokenizer, progress: Progress | None = None) -> None:
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer
        self._progress = progress
        self._context = engine.spec.context_length
        bos, ends = engine.spec.bos_token_id, engine.spec.eos_token_ids
        self._prefix = bos if bos is not None else ends[0] if ends else 0  # what an empty context is

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log likelihood, whether it is what would be generated) of each (context, continuation)."""
        return self._likelihoods([self._pair(*request.args) for request in requests], "options")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each whole text, every token given as many before it as the context holds."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self._encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self._context - 1,
                context_len=1,
            )
            pairs = [tuple(make_disjoint_window(window)) for window in windows]
            totals.append(sum(one for one, _ in self._likelihoods(pairs, "texts")))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What each context is continued by, up to the first of its `until` texts."""
        handles = (self._generate(*request.args) for request in requests)
        return list(self._in_order(handles, len(requests), "answers"))

    def _generate(self, context: str, settings: dict[str, Any]) -> Any:
        stops = settings.get("until") or []
        fields: dict[str, Any] = {"stop": [stops] if isinstance(stops, str) else list(stops)}
        fields["max_new_tokens"] = int(settings.get("max_gen_toks", NEW_TOKENS))
        if settings.get("do_sample"):
            fields |= {"do_sample": True, "temperature": settings.get("temperature", 1.0)}
        ids = self._encode(context) or [self._prefix]
        handle = self._engine.submit(ids[-(self._context - fields["max_new_tokens"]) :], None, **fields)
        return lambda: handle.result().choices[0].text

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both as token ids; spaces between them belong to the continuation, as the harness has it."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return [self._prefix], self._encode(continuation)
        whole, head = self._encode(stripped + continuation), self._encode(stripped)
        return head, whole[len(head) :]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        def submitted() -> Iterator[Any]:
            for context, group in groupby(pairs, key=lambda pair: pair[0]):
                options = [option for _, option in group]
                room = self._context - max(map(len, options))
                handle = self._engine.submit_likelihoods(context[-room:], options)
                yield handle.result

        groups = [len(list(group)) for _, group in groupby(pairs, key=lambda pair: pair[0])]
        found = self._in_order(submitted(), len(groups), what)
        return [one for likelihoods in found for one in likelihoods]

    def _in_order(self, waits: Iterator[Callable[[], Any]], total: int, what: str) -> Iterator[Any]:
        """The results of some requests, of which IN_FLIGHT run at a time."""
        running: list[Callable[[], Any]] = []
        for done in range(total):
            while len(running) < IN_FLIGHT and (wait := next(waits, None)) is not None:
                running.append(wait)
            yield running.pop(0)()
            if self._progress is not None:
                self._progress(what, done + 1, total)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)
