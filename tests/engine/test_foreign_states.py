"""The engine and the caches of foreign modules: slots that cost only what is used, whatever the strategy."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.errors import ModelError  # noqa: E402
from tests.models.foreign import foreign_modules as modules  # noqa: E402
from tests.models.foreign import inner_modules  # noqa: E402
from tests.models.foreign.test_encoder_decoder import SOURCES, make_bart  # noqa: E402

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13], [4, 4, 4, 4], [3] * 30, [6, 1], [2, 2, 2], [9]]
NEW = 24

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "n": {"n": 4, "temperature": 1.0, "seed": 1},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "drafts": {"speculative": "prompt_lookup"},
}

KINDS = {
    "lstm": partial(modules.Recurrent, torch.nn.LSTM),
    "gru": partial(modules.Recurrent, torch.nn.GRU),
    "rolling": modules.Rolling,
    "start_pos": inner_modules.MetaLlama,
    "use_cache": inner_modules.FromScratch,
    "input_pos": inner_modules.GPTFast,
    "optional input_pos": inner_modules.LitGPT,
    "get and update": inner_modules.ByObject,
}


def quiet(module: Any, **options: Any) -> InferenceEngine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return InferenceEngine(module, **options)


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_every_strategy_gives_what_it_gives_without_a_cache(make: Any, options: dict[str, Any]) -> None:
    with quiet(make()) as engine, quiet(make(), use_kv_cache=False) as plain:
        assert engine.model.calls.abilities.cache is not None
        assert engine.generate(PROMPTS, max_new_tokens=NEW, **options) == plain.generate(
            PROMPTS, max_new_tokens=NEW, **options
        )


def test_long_contexts_cost_what_is_used_of_them() -> None:
    """Each strategy, and eight texts together, with a context too long for several full ones to fit into memory."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32_768, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    module = transformers.Qwen2ForCausalLM(config).eval()
    with quiet(module) as engine, quiet(module, use_kv_cache=False) as plain:
        assert engine.spec.context_length == 32_768 and engine.spec.layout.layers == 0
        for options in STRATEGIES.values():
            wanted = plain.generate(PROMPTS, max_new_tokens=8, **options)
            assert engine.generate(PROMPTS, max_new_tokens=8, **options) == wanted
        rows: list[int] = []
        module.register_forward_pre_hook(lambda _, args, named: rows.append(len(named["input_ids"])), with_kwargs=True)
        engine.generate(PROMPTS, max_new_tokens=8)
        assert max(rows) == len(PROMPTS)


def test_a_text_that_ends_leaves_nothing_in_its_slot() -> None:
    with quiet(modules.PastArgument()) as engine:
        engine.generate(PROMPTS, max_new_tokens=4, num_beams=2)
        slots = [engine.model.slots[number] for number in range(8)]
        assert all(slot.group is slot.snapshot is None and not slot.tokens for slot in slots)


def test_a_prompt_that_the_encoder_refuses_ends_its_request_alone() -> None:
    torch.manual_seed(2)
    module = make_bart().eval()
    with InferenceEngine(module) as engine:
        wanted = [one.token_ids for one in engine.complete(SOURCES, max_new_tokens=8)]
        good = [engine.submit(source, max_new_tokens=8) for source in SOURCES]
        bad = engine.submit([3] * 65, max_new_tokens=8)  # longer than the encoder's positions
        assert [handle.result().token_ids for handle in good] == wanted
        with pytest.raises(ModelError, match="raised IndexError"):
            bad.result()


def test_a_hugging_face_module_with_a_state_of_its_own_is_cached() -> None:
    """RWKV's, which mixes the rows of a batch that continues: each text is run separately."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64,
        context_length=64, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    module = transformers.RwkvForCausalLM(config).eval()
    with quiet(module) as engine, quiet(module, use_kv_cache=False) as plain:
        assert engine.model.calls.abilities.cache is not None
        assert engine.generate(PROMPTS, max_new_tokens=NEW) == plain.generate(PROMPTS, max_new_tokens=NEW)


def hybrid(name: str) -> Any:
    """A tiny module of transformers whose layers keep states, or states as well as keys and values."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = dict(vocab_size=61, hidden_size=32, initializer_range=0.3, eos_token_id=None, bos_token_id=None)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    own: dict[str, dict[str, Any]] = {
        "Mamba": dict(num_hidden_layers=2, state_size=8),
        "Mamba2": dict(num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1, state_size=8, chunk_size=8),
        "Lfm2": dict(num_hidden_layers=2, layer_types=["conv", "full_attention"], **heads),
        "RecurrentGemma": dict(
            num_hidden_layers=3, lru_width=32, attention_window_size=16, pad_token_id=0,
            block_types=["recurrent", "recurrent", "attention"], **{**heads, "intermediate_size": 96},
        ),
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**common, **own[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Lfm2", "RecurrentGemma"])
def test_hugging_face_modules_with_states_beside_keys_and_values_are_cached(name: str) -> None:
    module = hybrid(name)
    with quiet(module) as engine, quiet(module, use_kv_cache=False) as plain:
        assert engine.model.calls.abilities.cache is not None
        for options in ({}, {"num_beams": 3}):
            wanted = plain.generate(PROMPTS, max_new_tokens=12, **options)
            assert engine.generate(PROMPTS, max_new_tokens=12, **options) == wanted
