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


class Block(torch.nn.Module):
    """A layer of nanoGPT."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attn.c_attn = torch.nn.Linear(width, 3 * width, bias=bias)
        self.attn.c_proj = torch.nn.Linear(width, width, bias=bias)
        self.mlp.c_fc = torch.nn.Linear(width, 4 * width, bias=bias)
        self.mlp.c_proj = torch.nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        parts = self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        q, k, v = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in parts)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp.c_proj(torch.nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_nanogpt(tmp_path: Path, bias: bool, wrapper: str) -> None:
    torch.manual_seed(4)
    parts = torch.nn.ModuleDict(
        {
            "wte": torch.nn.Embedding(65, 32),
            "wpe": torch.nn.Embedding(16, 32),
            "h": torch.nn.ModuleList(Block(32, 4, bias) for _ in range(2)),
            "ln_f": torch.nn.LayerNorm(32, bias=bias),
        }
    )
    with torch.inference_mode():
        for parameter in parts.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.dim() == 1))
        x = parts["wte"](torch.tensor([TOKENS])) + parts["wpe"](torch.arange(len(TOKENS)))
        for block in parts["h"]:
            x = block(x)
        wanted = (parts["ln_f"](x) @ parts["wte"].weight.T)[0].numpy()
    state = {f"{wrapper}transformer.{name}": tensor for name, tensor in parts.state_dict().items()}
    state |= {f"{wrapper}lm_head.weight": parts["wte"].weight}
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 65}
    content = {
        "model": state,
        "model_args": {**sizes, "bias": bias, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": 1.0,
    }
    torch.save(content, tmp_path / "ckpt.pt")
    assert np.abs(logits_of(tmp_path / "ckpt.pt") - wanted).max() < 1e-4


def test_a_checkpoint_of_another_script_says_what_is_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}, "args": {"layers": 3, "width": 8}}, tmp_path / "x.pt")
    with pytest.raises(
        FormatError, match="hyperparameters are layers, width; expected dim, .*MiniLLM.* or block_size, .*NanoGPT"
    ):
        open_checkpoint(tmp_path / "x.pt")
