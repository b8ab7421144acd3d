"""Foreign modules as models: right logits in every style of cache, batch, chunk, fork and truncation."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.errors import ConfigError, ModelError  # noqa: E402
from mnemos.models.foreign.adapt import adapt  # noqa: E402
from mnemos.models.foreign.model import ForeignModel  # noqa: E402
from mnemos.models.foreign.stored_tensors import move_plain  # noqa: E402
from tests.models.foreign import foreign_modules as modules  # noqa: E402
from tests.models.foreign.batches import Part, batch_of  # noqa: E402
from tests.models.foreign.inner_modules import GPTFast  # noqa: E402
from tests.models.foreign.test_conventions import CharacterRNN  # noqa: E402

CACHED = [modules.PastArgument, modules.Masked, modules.TakesKVCache, modules.WithCachedAttention]


def tiny_llama() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def make(kind: type | object) -> torch.nn.Module:
    return kind()  # type: ignore[operator]


def truth(module: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits of every position, by one uncached call."""
    with torch.inference_mode():
        output = module.eval()(torch.tensor([tokens]))
    logits = getattr(output, "logits", output)
    logits = logits["logits"] if isinstance(logits, dict) else logits
    return (logits[0] if isinstance(logits, tuple) else logits)[0].numpy()


def step(model: ForeignModel, *sequences: Part) -> list[np.ndarray]:
    """Runs (slot, first position, new tokens) of several sequences as one batch; the logits of all rows of each."""
    bounds = np.cumsum([len(new) for _, _, new in sequences])
    return np.split(model.forward(batch_of(*sequences)).logits, bounds[:-1])


@pytest.mark.parametrize("kind", [*CACHED, modules.Plain, tiny_llama], ids=lambda k: k.__name__)
def test_ragged_batches_chunks_forks_and_truncation_give_the_uncached_logits(kind) -> None:
    module = make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind is modules.Plain else "error")
        model = adapt(module)
    assert (model.calls.abilities.cache is None) == (kind is modules.Plain)
    model.reserve_states(4)
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 29, 14).tolist() for _ in range(3))
    seen: dict[str, list[np.ndarray]] = {"a": [], "b": [], "c": []}

    def run(**parts: tuple[int, int, int]) -> None:
        text = {"a": a, "b": b, "c": c}
        rows = step(model, *((slot, s, text[name][s:e]) for name, (slot, s, e) in parts.items()))
        for name, row in zip(parts, rows, strict=True):
            seen[name].append(row)

    run(a=(0, 0, 5), b=(1, 0, 3))  # prompts of different lengths
    run(a=(0, 5, 6), b=(1, 3, 4))  # one token each after different lengths
    run(a=(0, 6, 7), b=(1, 4, 5))
    run(b=(1, 5, 9), c=(2, 0, 4))  # a chunk, and a new one; a waits
    run(a=(0, 7, 8), b=(1, 9, 10), c=(2, 4, 5))
    run(c=(2, 5, 6), a=(0, 8, 9))  # another order, one has ended
    for name, text in (("a", a), ("b", b), ("c", c)):
        got = np.concatenate(seen[name])
        assert np.abs(got - truth(module, text[: len(got)])).max() < 1e-4

    model.copy_states([0], [3])  # the fork and the original diverge
    forked = [*a[:9], 7, 8]
    rows = step(model, (3, 9, [7]), (0, 9, a[9:10]))
    assert np.abs(rows[0][-1] - truth(module, forked[:10])[-1]).max() < 1e-4
    assert np.abs(rows[1][-1] - truth(module, a[:10])[-1]).max() < 1e-4
    rows = step(model, (3, 10, [8]))
    assert np.abs(rows[0][-1] - truth(module, forked)[-1]).max() < 1e-4
    rows = step(model, (0, 6, [1, 2]))  # back to position 6: what was there is forgotten
    assert np.abs(rows[0] - truth(module, [*a[:6], 1, 2])[6:]).max() < 1e-4


def test_modules_that_heed_a_mask_share_a_call_across_lengths() -> None:
    calls = []
    module = modules.Masked()
    model = adapt(module)
    assert model.calls.able.gaps
    model.reserve_states(2)
    step(model, (0, 0, [1, 2, 3]), (1, 0, [4]))
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    step(model, (0, 3, [5]), (1, 1, [6]))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [*CACHED, tiny_llama], ids=lambda k: k.__name__)
def test_what_a_module_appends_to_its_cache_is_not_copied(kind) -> None:
    """Over more steps than the initial room holds, the cache moves only a few times, and the logits stay right."""
    module = make(kind)
    model = adapt(module)
    assert model.calls.able.grows
    model.reserve_states(2)
    text = np.random.default_rng(1).integers(0, 29, 60).tolist()
    step(model, (0, 0, text[:2]), (1, 0, text[:2]))
    places = set()
    for place in range(2, 60):
        a, b = step(model, (0, place, text[place : place + 1]), (1, place, text[place : place + 1]))
        places.add(tuple(leaf.data_ptr() for leaf in model.calls.able.style.leaves(model.slots[0].group.past)))
    assert len(places) == 1
    for row in (a, b):
        assert np.abs(row[-1] - truth(module, text)[-1]).max() < 1e-4


def test_the_cache_moves_when_its_room_is_full_and_forks_keep_their_own(monkeypatch) -> None:
    monkeypatch.setattr("mnemos.models.foreign.growing_cache.LEAST_ROOM", 3)
    module = modules.PastArgument()
    model = adapt(module)
    model.reserve_states(2)
    text = np.random.default_rng(1).integers(0, 29, 40).tolist()
    step(model, (0, 0, text[:5]))
    for place in range(5, 30):
        (rows,) = step(model, (0, place, text[place : place + 1]))
        assert np.abs(rows[-1] - truth(module, text[: place + 1])[-1]).max() < 1e-4
    model.copy_states([0], [1])
    other = [*text[:30], 1, 2, 3]
    for place in range(30, 33):
        (mine,), (theirs,) = (step(model, (p, place, t[place : place + 1])) for p, t in ((0, text), (1, other)))
        assert np.abs(mine[-1] - truth(module, text[: place + 1])[-1]).max() < 1e-4
        assert np.abs(theirs[-1] - truth(module, other[: place + 1])[-1]).max() < 1e-4


class Flattens(modules.PastArgument):
    """Sees its cache as (batch, heads * time, ...), which only a tensor without room to grow allows."""

    def forward(self, x, use_cache=False, past_kv=None):
        logits, past = super().forward(x, use_cache=True, past_kv=past_kv)
        for pair in past if past_kv else ():
            for tensor in pair:
                tensor.view(tensor.shape[0], -1, tensor.shape[-1])
        return (logits, past) if use_cache else logits


def test_a_module_that_needs_its_cache_in_one_piece_gets_it_so() -> None:
    module = Flattens()
    model = adapt(module)
    assert model.calls.abilities.cache is not None and not model.calls.able.grows
    model.reserve_states(1)
    step(model, (0, 0, [1, 2, 3]))
    assert np.abs(step(model, (0, 3, [4]))[0] - truth(module, [1, 2, 3, 4])[-1]).max() < 1e-4


def test_hidden_states_are_what_the_head_reads() -> None:
    module = modules.PastArgument()
    model = adapt(module)
    model.reserve_states(1)
    output = model.forward(batch_of((0, 0, [3, 1, 2]), rows=[1, 2]))
    assert output.hidden.shape == (2, modules.WIDTH)
    assert np.allclose(output.hidden @ module.head.weight.detach().numpy().T, output.logits, atol=1e-5)


def test_a_module_that_answers_for_the_last_position_only() -> None:
    module = modules.LastOnly()
    with pytest.warns(UserWarning, match="no cache"):
        model = adapt(module)
    model.reserve_states(2)
    logits = model.forward(batch_of((0, 0, [3, 1, 2]), (1, 0, [4]), rows=[2, 3])).logits
    assert np.allclose(logits[0], truth(module, [3, 1, 2])[-1], atol=1e-5)
    assert np.allclose(logits[1], truth(module, [4])[-1], atol=1e-5)
    # Those of earlier positions take one call each.
    assert np.allclose(step(model, (0, 0, [1, 2]))[0], [truth(module, ids)[-1] for ids in ([1], [1, 2])], atol=1e-5)


def test_a_wrong_cache_is_found_out_and_not_used() -> None:
    module = modules.WrongCache()
    with pytest.warns(UserWarning, match="differ from those without by up to"):
        model = adapt(module)
    assert model.calls.abilities.cache is None


def test_training_mode_is_restored() -> None:
    module = modules.PastArgument().train()
    model = adapt(module)
    assert module.training
    model.reserve_states(1)
    step(model, (0, 0, [1, 2]))
    assert module.training


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (modules.NotCausal, "NotCausal.forward.*is not causal: without token 5"),
        (modules.Raises, "Raises.forward.*raised RuntimeError: out of cheese"),
        (lambda: torch.nn.Flatten(), "returned .*expected floating-point logits"),
    ],
)
def test_a_module_that_cannot_be_a_language_model_is_named(module, message) -> None:
    with pytest.raises(ModelError, match=message):
        adapt(module())


def test_vocabulary_and_device_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="tokenizer has 50 tokens but .* returns 29 logits"):
        adapt(modules.PastArgument(), vocabulary_size=50)
    with pytest.warns(UserWarning, match="the tokenizer has 31 tokens but .* prompts with other tokens are refused"):
        assert adapt(modules.PastArgument(), vocabulary_size=31).spec.vocabulary_size == 29
    with pytest.raises(ModelError, match=r"Plain\.forward.* has no values for embedding\.weight .*expected loaded"):
        adapt(modules.Plain().to("meta"))
    with pytest.raises(ConfigError, match="device is 'toaster', which PyTorch cannot use here: .*; expected 'cpu' or"):
        adapt(modules.PastArgument(), device="toaster")
    with pytest.raises(ConfigError, match=r"expected a torch.nn.Module"):
        adapt("model.pt")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_device_moves_the_module() -> None:
    module = tiny_llama()
    assert adapt(module, device="cuda").spec.vocabulary_size == modules.VOCABULARY
    assert all(parameter.is_cuda for parameter in module.parameters())


def test_tensors_that_a_module_holds_itself_are_moved_with_it() -> None:
    module = modules.PastArgument()
    module.angles, module.tables = torch.ones(3), {"both": [torch.ones(2), None]}
    module.register_buffer("kept", torch.ones(2))
    move_plain(module, torch.device("meta"))
    assert module.angles.is_meta and module.tables["both"][0].is_meta
    assert not module.kept.is_meta and not module.head.weight.is_meta  # which `to` moves


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [GPTFast, CharacterRNN])
def test_caches_and_states_that_a_module_makes_are_made_where_it_is(make: type[torch.nn.Module]) -> None:
    module = make()
    with torch.device("meta"):  # where PyTorch makes tensors of which nothing else is said
        model = adapt(module)
    assert model.calls.abilities.cache is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the module is moved")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="device is 'cuda', which PyTorch cannot use here: .*; expected 'cpu' or"):
        adapt(modules.PastArgument(), device="cuda")


def test_a_module_that_cannot_be_moved_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bound(modules.PastArgument):  # type: ignore[misc, name-defined]
        """Like those of bitsandbytes."""

        def to(self, *place: object) -> Bound:
            raise ValueError("`.to` is not supported for 8-bit models")

    monkeypatch.setattr("mnemos.models.foreign.adapt.usable_device", lambda name: torch.device("meta"))
    message = "device is 'cuda' and Bound is on cpu, from where it cannot be moved: `.to` is not supported"
    with pytest.raises(ConfigError, match=message):
        adapt(Bound(), device="cuda")


def test_logits_are_told_from_hidden_states_beside_them() -> None:
    module = modules.HiddenFirst()
    with pytest.warns(UserWarning, match="no cache"):
        model = adapt(module)
    assert model.spec.vocabulary_size == modules.VOCABULARY


def test_a_module_that_rules_tokens_out_keeps_its_infinities() -> None:
    with pytest.warns(UserWarning, match="no cache"):
        model = adapt(modules.RulesOut())
    model.reserve_states(1)
    (logits,) = step(model, (0, 0, [1, 2, 3]))
    assert np.isneginf(logits[:, 20:]).all() and np.isfinite(logits[:, :20]).all()


def test_logits_that_are_not_numbers_are_refused() -> None:
    module = modules.Plain()
    torch.nn.init.constant_(module.head.weight, float("nan"))
    with pytest.raises(ModelError, match="returned logits that are not finite for ids"):
        adapt(module)


def test_modules_that_cannot_take_several_sequences_say_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not adapt(modules.Alone()).spec.batches
    with pytest.warns(UserWarning, match="Mixing.*influence each other's logits, by up to .*; each is run by itself"):
        assert not adapt(modules.Mixing(), use_kv_cache=False).spec.batches
    mixing = adapt(modules.MixesStates())
    assert mixing.calls.abilities.batches and mixing.calls.able.rewinds is mixing.spec.batches is False
    assert adapt(modules.PastArgument()).spec.batches


def test_logits_of_too_few_positions_are_refused() -> None:
    class Drops(modules.Plain):
        """Forgets the last position, later."""

        whole = True

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids)[:, : ids.shape[1] - (not self.whole)]

    module = Drops()
    with pytest.warns(UserWarning, match="no cache"):
        model = adapt(module)
    model.reserve_states(1)
    module.whole = False
    with pytest.raises(ModelError, match=r"Drops.* returned logits of shape \(1, 3, 29\); expected \(1, 4, 29\)"):
        step(model, (0, 0, [1, 2, 3, 4]))
