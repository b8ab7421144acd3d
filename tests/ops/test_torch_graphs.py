"""Recorded steps: rounded up and filled again, they compute what the step itself does, and are few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.gpu import HAS_CUDA  # noqa: E402
from tests.models.checkpoints import CONFIGS, build, token_ids  # noqa: E402
from tests.models.stepping import Session  # noqa: E402

from mnemos.contract import Batch  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.models.load import LoadedModel, load_model  # noqa: E402
from mnemos.ops import torch as torch_ops  # noqa: E402
from mnemos.ops.torch_graphs import SEEN, DecodeGraphs  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("llama", "gemma3", "gpt2", "qwen3moe")
    return {name: build(CONFIGS[name](), tmp_path_factory.mktemp(name)).folder for name in names}


class Repeats:
    """In place of a CUDA graph: runs the step again, on the same inputs."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        self.recorded += 1
        return run


def loaded(folder: Path, device: str, pages: int) -> LoadedModel:
    model = load_model(open_checkpoint(folder), backend=f"torch:{device}", dtype="float32")
    model.reserve(pages)
    return model


def steps(model: LoadedModel, count: int) -> list[np.ndarray]:
    """Logits of three texts of different lengths that go on together, then of two of them, then of one again."""
    session = Session(model, [[3, 11, 0, 1], [22, 21, 20, 19], [13, 4, 2, 5]])
    found = [np.concatenate(list(session.step({t: token_ids(5 + 9 * t, t) for t in range(3)}).values()))]
    for texts in ([0, 1, 2], [0, 2], [1]):
        for number in range(count):
            found += session.step({t: token_ids(1, number + t) for t in texts}).values()
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_what_is_recorded_computes_the_step(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(loaded(folders[name], "cpu", 24), SEEN + 4)
    records, given = Repeats(), list[Batch]()

    class Graphs(DecodeGraphs):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, record=records)

        def step(self, batch: Batch) -> Any:
            found = super().step(batch)
            if found is not None:
                given.append(batch)
            return found

    monkeypatch.setattr(torch_ops, "DecodeGraphs", Graphs)
    monkeypatch.setattr(torch_ops, "RECORDS", ("cpu",))
    found = steps(loaded(folders[name], "cpu", 24), SEEN + 4)
    assert records.recorded == 3 and len(given) == 3 * 4  # a shape each for three texts, for two and for one
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3moe"])
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device")
def test_graphs_on_a_gpu_compute_the_step(name: str, folders: dict[str, Path]) -> None:
    expected = steps(loaded(folders[name], "cpu", 24), SEEN + 4)
    found = steps(loaded(folders[name], "cuda", 24), SEEN + 4)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4)
