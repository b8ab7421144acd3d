"""Caches that do not hold every position: states of fixed size, and windows that show only after probing."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.models.foreign.adapt import adapt  # noqa: E402
from mnemos.models.foreign.model import ForeignModel  # noqa: E402
from tests.models.foreign import foreign_modules as modules  # noqa: E402
from tests.models.foreign.batches import Part, batch_of  # noqa: E402

KINDS = {
    "lstm": partial(modules.Recurrent, torch.nn.LSTM),
    "gru": partial(modules.Recurrent, torch.nn.GRU),
    "written in place": modules.WritesItsState,
}


def truth(module: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits of the last position, by one call over all tokens."""
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        output = module.eval()(ids, None) if isinstance(module, modules.WritesItsState) else module.eval()(ids)
    return (output[0] if isinstance(output, tuple) else output)[0, -1].numpy()


class Texts:
    """Some texts in the slots of a model, which `run` continues and compares with calls over the whole."""

    def __init__(self, module: torch.nn.Module, model: ForeignModel, count: int) -> None:
        self.module, self.model = module, model
        rng = np.random.default_rng(0)
        self.texts = [rng.integers(0, modules.VOCABULARY, 64).tolist() for _ in range(count)]
        model.reserve_states(count)

    def run(self, *parts: tuple[int, int, int]) -> None:
        """(slot, start, end) of each."""
        given: list[Part] = [(slot, start, self.texts[slot][start:end]) for slot, start, end in parts]
        last = np.cumsum([end - start for _, start, end in parts]) - 1
        logits = self.model.forward(batch_of(*given, rows=last)).logits
        for (slot, _, end), row in zip(parts, logits, strict=True):
            assert np.abs(row - truth(self.module, self.texts[slot][:end])).max() < 1e-4

    def fork(self, source: int, target: int, length: int) -> None:
        """The target continues from the source's first `length` tokens, which the source has evaluated."""
        self.texts[target][:length] = self.texts[source][:length]
        self.model.copy_states([source], [target])


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_states_of_fixed_size_are_kept_sequence_by_sequence(make) -> None:
    module = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapt(module)
    assert model.calls.abilities.cache is not None and not model.spec.rewinds
    assert model.spec.chunks == (make is not modules.WritesItsState)
    texts = Texts(module, model, 4)
    texts.run((0, 0, 5), (1, 0, 3))
    texts.run((0, 5, 6), (1, 3, 4))
    texts.fork(0, 3, 6)
    texts.run((1, 4, 5), (2, 0, 4))  # a new one; the first waits
    texts.run((2, 4, 5), (0, 6, 7), (3, 6, 7))  # the fork and the original diverge
    texts.run((0, 7, 8))
    texts.run((3, 7, 10), (1, 5, 8))


def test_recurrent_texts_of_all_lengths_share_a_call() -> None:
    module = modules.Recurrent()
    texts = Texts(module, adapt(module), 3)
    texts.run((0, 0, 5), (1, 0, 3), (2, 0, 7))
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    logits = texts.model.forward(batch_of((0, 5, [1]), (1, 3, [2]), (2, 7, [3]))).logits
    assert len(calls) == 1 and len(logits) == 3


def test_a_cache_that_keeps_a_window_is_right_in_any_company() -> None:
    """The window is longer than the probe, so that it shows only in longer texts."""
    module = modules.Rolling()
    model = adapt(module)
    assert model.calls.abilities.cache is not None
    texts = Texts(module, model, 5)
    texts.run((0, 0, 5), (1, 0, 30), (2, 0, 9))  # padded to the longest, whose cache has dropped positions
    for step in range(12):
        texts.run((0, 5 + step, 6 + step), (1, 30 + step, 31 + step), (2, 9 + step, 10 + step))
    texts.fork(1, 3, 42)
    texts.run((1, 42, 43), (3, 42, 43), (0, 17, 20))
    texts.run((3, 43, 44), (4, 0, 43))
    texts.run((4, 43, 44), (1, 43, 44))
    texts.run((1, 20, 22))  # back, to positions that the cache has dropped
    texts.run((1, 22, 23), (2, 21, 22))


def test_one_text_rolls_without_being_evaluated_again() -> None:
    module = modules.Rolling()
    texts = Texts(module, adapt(module), 1)
    texts.run((0, 0, 10))
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(args[0].numel()), with_kwargs=True)
    for step in range(10, 30):
        texts.model.forward(batch_of((0, step, texts.texts[0][step : step + 1])))
    assert sizes == [1] * 20
