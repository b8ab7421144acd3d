"""Small models of every kind, and how their packages are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mnemos import ModelPackager  # noqa: E402
from tests.models.checkpoints import CONFIGS, VOCABULARY, Reference, build  # noqa: E402

IDS = [5, 17, 3, 90, 44, 2]


class OwnModel(nn.Module):
    """A class of the user's own, with its head tied to its embedding after it was made."""

    def __init__(self, vocab_size: int, d_model: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.mix = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.register_buffer("steps", torch.tensor(1 << 40))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, input_ids: Any) -> Any:
        hidden = self.embedding(input_ids)
        past = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.head(self.dropout(torch.tanh(self.mix(past))))


def logits(module: Any) -> Any:
    with torch.no_grad():
        answer = module(torch.tensor([IDS]))
    answer = getattr(answer, "logits", answer)
    return (answer[0] if isinstance(answer, tuple) else answer)[0]


@pytest.fixture
def own_model() -> OwnModel:
    torch.manual_seed(0)
    model = OwnModel(VOCABULARY, 24)
    model.head.weight = model.embedding.weight
    return model


@pytest.fixture
def package(own_model: OwnModel, tmp_path: Path) -> Path:
    """The package of `own_model`."""
    ModelPackager(own_model, None, {"vocab_size": VOCABULARY, "d_model": 24}).package(tmp_path / "package")
    return tmp_path / "package"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build(CONFIGS["llama-tied"](), tmp_path_factory.mktemp("packaging") / "llama")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.json of the models' vocabulary."""
    import tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    made = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    made.save(str(folder / "tokenizer.json"))
    return folder
