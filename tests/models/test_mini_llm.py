"""Training checkpoints (.pt) of Mini-LLM's form: the built-in model computes what the training code does."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.contract import Batch  # noqa: E402
from mnemos.errors import FormatError  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.models.load import load_model  # noqa: E402
from tests.models.foreign.mini_llm import make_transformer  # noqa: E402

TOKENS = [5, 17, 3, 60, 0, 22, 41]


def logits_of(path: Path) -> np.ndarray:
    model = load_model(open_checkpoint(path), backend="numpy", dtype="float32")
    model.reserve(1)
    time = len(TOKENS)
    arrays = (TOKENS, range(time), [0, time], [0], [0], [0, 1], range(time))
    return model.forward(Batch(*(np.array(a, dtype=np.int32) for a in arrays))).logits


@pytest.mark.parametrize("form", ["dict", "dataclass", "compiled"])
def test_a_checkpoint_with_its_arguments_gives_the_modules_logits(tmp_path: Path, form: str) -> None:
    module = make_transformer()
    with torch.inference_mode():
        wanted = module(torch.tensor([TOKENS]))[0][0].numpy()
    state = module.state_dict()
    if form == "compiled":
        state = {"_orig_mod." + name: tensor for name, tensor in state.items()}
    arguments = module.args if form == "dataclass" else asdict(module.args)
    torch.save({"model_args": arguments, "model": state, "iter_num": 7}, tmp_path / "ckpt.pt")
    assert np.abs(logits_of(tmp_path / "ckpt.pt") - wanted).max() < 1e-4


def test_a_plain_state_dict_says_what_is_missing(tmp_path: Path) -> None:
    torch.save(make_transformer().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(FormatError, match="without hyperparameters; expected 'model_args'"):
        open_checkpoint(tmp_path / "weights.pt")


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return (eval, (f"open({str(self.witness)!r}, 'w')",))


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, old_format: bool) -> None:
    witness = tmp_path / "ran"
    content = {"model_args": Hostile(witness), "model": {}}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(FormatError, match="bad.pt"):
        open_checkpoint(tmp_path / "bad.pt")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", pickle.dumps([1, 2]), b"\x80\x02no pickle"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(FormatError, match="x.pt"):
        open_checkpoint(tmp_path / "x.pt")


def test_what_holds_no_tensors_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"a": 1}, "model_args": {}}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="holds no tensors"):
        open_checkpoint(tmp_path / "x.pt")
    torch.save([torch.zeros(1)], tmp_path / "x.pt")
    with pytest.raises(FormatError, match="holds a list"):
        open_checkpoint(tmp_path / "x.pt")
