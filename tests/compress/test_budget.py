"""Choosing types: the best that fits, found among all choices where these can be listed, and measured on a model."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mnemos.compress.budget import Option, choose, measure_options
from mnemos.compress.calibration import Calibration
from mnemos.errors import ConfigError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.tensor_types import TensorType as T
from tests.models.checkpoints import CONFIGS, build, token_ids
from tests.models.gguf_files import write_gguf

TYPES = (T.Q4_0, T.Q5_0, T.Q8_0)


def options(seed: int, tensors: int = 6) -> dict[str, list[Option]]:
    """Tensors of a few sizes, whose loss falls by about four with each bit."""
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(tensors):
        blocks, loss = int(rng.integers(1, 20)), float(rng.gamma(1.0))
        made[f"t{number}"] = [
            Option(type, blocks * type.block[1], loss * float(rng.uniform(0.8, 1.2)) * 4.0 ** -(type.block[1] * 8 / 32))
            for type in TYPES
        ]
    return made


def all_choices(given: dict[str, list[Option]]) -> list[tuple[int, float]]:
    return [(sum(o.bytes for o in own), sum(o.loss for o in own)) for own in product(*given.values())]


@pytest.mark.parametrize("seed", range(8))
def test_a_size_gets_nearly_the_least_loss(seed: int) -> None:
    given = options(seed)
    choices = all_choices(given)
    smallest, largest = min(choices)[0], max(choices)[0]
    for size in np.linspace(smallest, largest, 7).astype(int):
        found = choose(given, size=int(size))
        assert found.bytes <= size
        assert found.types.keys() == given.keys()
        best = min(loss for own, loss in choices if own <= size)
        assert best - 1e-12 <= found.loss <= 1.5 * best + 1e-12  # one tensor of six may be a step off


@pytest.mark.parametrize("seed", range(8))
def test_a_loss_gets_nearly_the_smallest_size(seed: int) -> None:
    given = options(seed)
    choices = all_choices(given)
    for loss in np.quantile([loss for _, loss in choices], [0.05, 0.3, 0.8]):
        found = choose(given, loss=float(loss))
        assert found.loss <= loss
        best = min(own for own, lost in choices if lost <= loss)
        largest_step = max(own[-1].bytes - own[0].bytes for own in given.values())
        assert best <= found.bytes <= best + largest_step


def test_what_cannot_be_reached_is_refused() -> None:
    given = options(0)
    with pytest.raises(ConfigError, match="size leaves 10 bytes for the quantized tensors, which need at least"):
        choose(given, size=10)
    with pytest.raises(ConfigError, match="quantized tensors are expected to lose at least"):
        choose(given, loss=1e-12)


def test_options_are_measured_on_the_model(tmp_path: Path) -> None:
    pytest.importorskip("mnemos._native")
    source = write_gguf(build(CONFIGS["llama"](), tmp_path / "folder").module, tmp_path / "model.gguf")
    calibration = Calibration(open_checkpoint(source), token_ids(256), chunk=128)
    found = measure_options(calibration)
    assert {"token_embd.weight", "output.weight", "blk.0.attn_v.weight", "blk.2.ffn_up.weight"} <= found.keys()
    assert "blk.0.attn_norm.weight" not in found
    assert "blk.0.ffn_down.weight" not in found  # rows of 88 weights divide into no block
    for name, own in found.items():
        by_type = {option.type: option for option in own}
        assert by_type[T.Q4_0].loss > by_type[T.Q5_0].loss > by_type[T.Q8_0].loss > 0
        assert by_type[T.Q8_0].bytes == 34 * calibration.checkpoint.tensors[name].size // 32
