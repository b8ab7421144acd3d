"""Encoder-decoder models: the prompt encoded once, decoders of different lengths and sources in one batch."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos.errors import ModelError  # noqa: E402
from mnemos.models.load import adapt  # noqa: E402
from tests.models.foreign.batches import Part, batch_of  # noqa: E402

SOURCES = [[5, 6, 7, 8, 1], [9, 10, 1]]


def make_t5() -> torch.nn.Module:
    sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def make_bart() -> torch.nn.Module:
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, init_std=0.3,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_cached_ragged_decoding_gives_the_logits_of_the_whole(make) -> None:
    torch.manual_seed(0)
    module = make().eval()
    model = adapt(module)
    model.reserve_states(3)
    begins = [model.start_tokens(source) for source in SOURCES]
    for slot, source in enumerate(SOURCES):
        model.begin(slot, source)

    def step(*parts: Part) -> np.ndarray:
        """The logits of each part's last row."""
        return model.forward(batch_of(*parts, rows=np.cumsum([len(new) for *_, new in parts]) - 1)).logits

    def check(got: np.ndarray, source: int, decoded: list[int]) -> None:
        with torch.inference_mode():
            ids = torch.tensor([begins[source] + decoded])
            wanted = module(input_ids=torch.tensor([SOURCES[source]]), decoder_input_ids=ids).logits[0, -1].numpy()
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max() + 1e-5

    first = step((0, 0, begins[0]), (1, 0, begins[1]))
    check(first[0], 0, [])
    check(first[1], 1, [])
    second = step((0, 1, [3]), (1, 1, [4]))
    check(second[0], 0, [3])
    check(second[1], 1, [4])
    model.copy_states([1], [2])
    third = step((2, 2, [7]), (0, 2, [8]))
    check(third[0], 1, [4, 7])
    check(third[1], 0, [3, 8])
    fourth = step((1, 2, [9]), (2, 3, [9]))
    check(fourth[0], 1, [4, 9])
    check(fourth[1], 1, [4, 7, 9])


def test_decoding_without_an_encoded_prompt_is_refused() -> None:
    model = adapt(make_bart())
    model.reserve_states(1)
    with pytest.raises(ModelError, match="needs an encoded prompt"):
        model.forward(batch_of((0, 0, [3])))
