"""Caches inside modules: found by what a call changes, lent to the module for a call, and right for every sequence."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.errors import ModelError  # noqa: E402
from mnemos.models.foreign.adapt import adapt  # noqa: E402
from mnemos.models.foreign.inner_cache import InnerStyle  # noqa: E402
from tests.models.foreign import inner_modules as modules  # noqa: E402
from tests.models.foreign.batches import Part, batch_of  # noqa: E402
from tests.models.foreign.foreign_modules import PastArgument  # noqa: E402

STYLES = [
    modules.MetaLlama, modules.FromScratch, modules.Roomy, modules.GPTFast, modules.LitGPT, modules.ByObject,
    modules.Always, modules.Static,
]  # fmt: skip


def make(kind: type[Any]) -> Any:
    if kind is modules.Static:
        pytest.importorskip("transformers")
    return kind().eval()


def truth(module: Any, tokens: list[int]) -> np.ndarray:
    """Logits of every position, by one call of a separate module over the whole text."""
    module, ids = copy.deepcopy(module), torch.tensor([tokens])
    with torch.inference_mode():
        if isinstance(module, modules.MetaLlama):
            return module(ids, 0)[0].numpy()
        if isinstance(module, modules.GPTFast):
            module.setup_caches(1, modules.CONTEXT)
        if isinstance(module, (modules.GPTFast, modules.Static)):
            return module(ids, torch.arange(len(tokens)))[0].numpy()
        return module(ids)[0].numpy()


def state_of(module: Any) -> dict[str, Any]:
    """The attributes of a module's parts, as text unless they are tensors."""
    held: dict[str, Any] = {}
    for name, member in module.named_modules():
        for key, value in {**vars(member), **member._buffers}.items():
            held[f"{name}.{key}"] = value.clone() if isinstance(value, torch.Tensor) else str(value)
    return held


@pytest.mark.parametrize("kind", STYLES, ids=lambda k: k.__name__)
def test_ragged_batches_chunks_forks_and_truncation_give_the_uncached_logits(kind: type[Any]) -> None:
    module = make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapt(module)
    assert isinstance(model.calls.able.style, InnerStyle)
    assert model.spec.batches and model.spec.chunks and model.spec.rewinds
    model.reserve_states(4)
    rng = np.random.default_rng(0)
    texts = {slot: rng.integers(0, 29, 40).tolist() for slot in range(4)}

    def run(*parts: tuple[int, int, int]) -> None:
        given: list[Part] = [(slot, start, texts[slot][start:end]) for slot, start, end in parts]
        rows = np.split(model.forward(batch_of(*given)).logits, np.cumsum([len(new) for _, _, new in given])[:-1])
        for (slot, start, end), logits in zip(parts, rows, strict=True):
            assert np.abs(logits - truth(module, texts[slot][:end])[start:]).max() < 1e-4

    run((0, 0, 5), (1, 0, 3))  # prompts of different lengths
    run((0, 5, 6), (1, 3, 4))
    run((0, 6, 7), (1, 4, 5))
    run((1, 5, 9), (2, 0, 4))  # a chunk, and a new one; the first waits
    run((0, 7, 8), (1, 9, 10), (2, 4, 5))
    run((2, 5, 6), (0, 8, 9))
    run((2, 6, 9))
    run((0, 9, 10), (2, 9, 10))  # equally long, from here on in one call
    run((0, 10, 11), (2, 10, 11))
    texts[3] = [*texts[0][:11], *texts[3][11:]]
    model.copy_states([0], [3])  # the fork and the original diverge
    run((3, 11, 12), (0, 11, 12))
    run((3, 12, 14))
    texts[0] = [*texts[0][:6], *texts[1][6:]]
    run((0, 6, 8))  # back to position 6: what was there is forgotten
    run((0, 8, 20), (3, 14, 15))  # more positions than some have room for
    run((0, 20, 21), (3, 15, 17))
    model.clear_states([3])
    run((3, 0, 2), (0, 21, 24))


@pytest.mark.parametrize("kind", STYLES, ids=lambda k: k.__name__)
def test_a_module_is_left_as_it_was_found(kind: type[Any]) -> None:
    module = make(kind)
    before = state_of(module)
    model = adapt(module)
    model.reserve_states(1)
    model.forward(batch_of((0, 0, [1, 2, 3])))
    model.forward(batch_of((0, 3, [4])))
    after = state_of(module)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def test_only_new_tokens_are_run() -> None:
    for kind in STYLES:
        if kind is modules.Static:
            continue
        module = make(kind)
        model = adapt(module)
        model.reserve_states(2)
        model.forward(batch_of((0, 0, [1, 2, 3]), (1, 0, [4, 5, 6])))
        sizes: list[tuple[int, ...]] = []
        module.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(tuple(args[0].shape)))
        for place in range(3, 8):
            model.forward(batch_of((0, place, [7]), (1, place, [8])))
        assert sizes == [(2, 1)] * 5, kind


def test_what_a_module_stores_and_does_not_read_is_no_cache() -> None:
    with pytest.warns(UserWarning, match="no cache"):
        model = adapt(modules.Remembers())
    assert model.calls.abilities.cache is None


def test_a_fork_keeps_the_positions_that_it_has_and_no_more() -> None:
    model = adapt(modules.MetaLlama())
    model.reserve_states(2)
    model.forward(batch_of((0, 0, [1, 2, 3])))
    model.copy_states([0], [1])
    snapshot = model.slots[1].snapshot
    assert snapshot is not None
    assert {tuple(leaf.shape) for leaf in snapshot.leaves} == {(1, 3, modules.HEADS, modules.HEAD)}
    assert {leaf.untyped_storage().nbytes() for leaf in snapshot.leaves} == {4 * 3 * modules.WIDTH}


class Unusable(modules.GPTFast):
    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        raise RuntimeError("no room")


def test_a_module_that_needs_a_cache_and_makes_none_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Unusable\.forward.* requires input_pos.*expected one of its own"):
        adapt(Unusable())


def test_a_module_that_was_set_up_by_its_owner_keeps_its_own_cache() -> None:
    module = modules.GPTFast()
    module.setup_caches(4, 16)
    caches = [layer.kv_cache for layer in module.layers]
    model = adapt(module)
    model.reserve_states(2)
    text = np.random.default_rng(0).integers(0, 29, 20).tolist()
    wanted = truth(modules.GPTFast(), text)
    rows = [model.forward(batch_of((0, at, text[at : at + 1]), (1, at, text[at : at + 1]))).logits for at in range(20)]
    assert np.abs(np.array(rows) - wanted[:, None]).max() < 1e-4
    assert all(layer.kv_cache is cache for layer, cache in zip(module.layers, caches, strict=True))
    assert (module.max_batch_size, module.max_seq_length) == (4, 16)
    assert not any(cache.k_cache.any() for cache in caches)


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_keep_their_cache_inside_the_module() -> None:
    module = torch.ao.quantization.quantize_dynamic(modules.MetaLlama().eval(), {torch.nn.Linear}, dtype=torch.qint8)
    model = adapt(module)
    assert isinstance(model.calls.able.style, InnerStyle)
    model.reserve_states(1)
    text = [1, 2, 3, 4, 5]
    rows = np.concatenate([model.forward(batch_of((0, at, [token]))).logits for at, token in enumerate(text)])
    wanted = truth(module, text)
    assert np.abs(rows - wanted).max() < 0.08 * np.abs(wanted).max()  # each call rounds by the range of its own inputs


class OffsetBeside(PastArgument):
    def forward(self, x: torch.Tensor, use_cache: bool = False, past_kv: Any = None, past_length: int = 0) -> Any:
        return super().forward(x, use_cache, past_kv)


def test_a_cache_that_is_an_argument_comes_before_one_inside() -> None:
    model = adapt(OffsetBeside())
    assert not isinstance(model.calls.able.style, InnerStyle) and model.calls.able.grows


class Locked:
    """Cannot be copied or compared."""

    def __new__(cls, key: str) -> Locked:
        return super().__new__(cls)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("locked")

    __hash__ = None  # type: ignore[assignment]


class KeepsLocked(modules.Remembers):
    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        self.locked = Locked("key")
        return super().forward(ids)


def test_objects_that_cannot_be_looked_into_leave_a_module_without_a_cache() -> None:
    with pytest.warns(UserWarning, match="no cache"):
        assert adapt(KeepsLocked()).calls.abilities.cache is None
