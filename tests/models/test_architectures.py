"""Every architecture gives the logits of Hugging Face transformers, however its texts are cut and mixed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from mnemos.models.load import LoadedModel
from tests.models.checkpoints import CONFIGS, Reference, token_ids
from tests.models.conftest import HAS_NATIVE, open_model
from tests.models.stepping import Session, whole

TOLERANCE = 1e-4
LoadFunction = Callable[[str, str], LoadedModel]
ReferenceFunction = Callable[[str], Reference]
each_architecture = pytest.mark.parametrize("name", CONFIGS)


@each_architecture
def test_whole_prompt(name: str, backend: str, load: LoadFunction, reference: ReferenceFunction) -> None:
    ids = token_ids(75)
    expected = reference(name).logits(ids)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(whole(load(name, backend), ids, [5, 2, 9]), expected, atol=TOLERANCE)


@each_architecture
def test_chunks_and_cached_steps(name: str, backend: str, load: LoadFunction, reference: ReferenceFunction) -> None:
    ids = token_ids(48, seed=1)
    session = Session(load(name, backend), [[3, 11]])
    cuts = [0, 1, 20, 37, *range(38, 49)]
    parts = [session.step({0: ids[a:b]})[0] for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(parts), reference(name).logits(ids), atol=TOLERANCE)


@each_architecture
def test_ragged_batch(name: str, backend: str, load: LoadFunction, reference: ReferenceFunction) -> None:
    """Prompts, chunks and single steps of several texts in one batch, each in its own scattered pages."""
    texts = [token_ids(40, seed=2), token_ids(9, seed=3), token_ids(66, seed=4)]
    session = Session(load(name, backend), [[7, 0], [22], [13, 4, 1]])
    steps = [
        {0: (0, 33), 1: (0, 1)},
        {2: (0, 64), 0: (33, 34)},
        {1: (1, 8), 0: (34, 40), 2: (64, 65)},
        {2: (65, 66), 1: (8, 9)},
    ]
    found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for step in steps:
        for text, logits in session.step({text: texts[text][a:b] for text, (a, b) in step.items()}).items():
            found[text].append(logits)
    for text, ids in enumerate(texts):
        np.testing.assert_allclose(np.concatenate(found[text]), reference(name).logits(ids), atol=TOLERANCE)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
@each_architecture
def test_native_default_stays_close(name: str, reference: ReferenceFunction) -> None:
    """Weights as stored, activations of 8 or 16 bits, a float16 cache: near the float32 logits."""
    ids = token_ids(48, seed=7)
    model = open_model(reference(name).folder, "native", dtype="auto")
    session = Session(model, [[3, 1]])
    found = np.concatenate([session.step({0: ids[:40]})[0], *(session.step({0: [token]})[0] for token in ids[40:])])
    expected = reference(name).logits(ids)
    assert np.abs(found - expected).mean() < 0.03 * expected.std()


@each_architecture
def test_only_the_rows_asked_for(name: str, backend: str, load: LoadFunction) -> None:
    """Logits and hidden states of some rows, in any order, or of none; the cache is filled for all."""
    ids = [token_ids(21, seed=5), token_ids(13, seed=6)]
    model, pages = load(name, backend), [[5], [17]]
    all_rows = Session(model, pages).step({0: ids[0], 1: ids[1]})
    all_hidden = Session(model, pages).outputs({0: ids[0], 1: ids[1]}).hidden.copy()
    session = Session(model, pages)
    assert session.outputs({0: ids[0][:9]}, rows=[]).logits.shape == (0, model.spec.vocabulary_size)
    found = session.outputs({0: ids[0][9:], 1: ids[1]}, rows=[24, 11])
    np.testing.assert_allclose(found.logits, [all_rows[1][12], all_rows[0][20]], atol=1e-5)
    np.testing.assert_allclose(found.hidden, all_hidden[[33, 20]], atol=1e-5)
