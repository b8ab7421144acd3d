"""What people's modules expect beyond the names of their arguments: each module generates what a loop by hand does."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.errors import ModelError  # noqa: E402
from mnemos.models.foreign.adapt import adapt  # noqa: E402
from mnemos.models.foreign.cache_styles import GivenStyle, NestedStyle  # noqa: E402
from tests.models.foreign.foreign_modules import CONTEXT, VOCABULARY, Base, PastArgument, Plain, TimeFirst  # noqa: E402

PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9], [4]]
NEW = 8


class CharacterRNN(nn.Module):
    """A first state from a method, and logits of all tokens in one axis, as in courses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.lstm = nn.Embedding(VOCABULARY, 16), nn.LSTM(16, 24, 2, batch_first=True)
        self.head = nn.Linear(24, VOCABULARY)
        nn.init.normal_(self.head.weight, std=2.0)

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> Any:
        (h, c), x = hidden, self.embedding(x)
        output, hidden = self.lstm(x, (h, c))
        return self.head(output.contiguous().view(-1, 24)), hidden

    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(2, batch_size, 24), torch.zeros(2, batch_size, 24)


class WordModel(nn.Module):
    """PyTorch's example of a language model: (time, batch), and one axis for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.encoder, self.rnn = nn.Embedding(VOCABULARY, 16), nn.GRU(16, 24, 2)
        self.decoder = nn.Linear(24, VOCABULARY)
        nn.init.normal_(self.decoder.weight, std=2.0)

    def forward(self, input: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, hidden = self.rnn(self.encoder(input), hidden + 0)
        return self.decoder(output).view(-1, VOCABULARY).log_softmax(1), hidden

    def init_hidden(self, bsz: int) -> Tensor:
        return torch.zeros(2, bsz, 24)


class WithCache(Base):
    """Keys and values of each layer through `keep`."""

    def run(self, ids: Tensor, start: int, keep: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        x = self.embed(ids, start)
        for index, layer in enumerate(self.layers):
            x = layer(x, lambda k, v, index=index: keep(index, k, v))
        return self.head(self.norm(x))


class WritesIntoMapping(WithCache):
    """A mapping that is changed in place, if there is one."""

    def forward(self, ids: Tensor, cache: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        def keep(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if cache is None:
                return k, v
            if index in cache:
                k, v = torch.cat((cache[index][0], k), 2), torch.cat((cache[index][1], v), 2)
            cache[index] = (k, v)
            return cache[index]

        return self.run(ids, cache[0][0].shape[2] if cache else 0, keep)


class WritesIntoList(WithCache):
    """A list with None for each layer, which has to be given and is changed in place."""

    def forward(self, ids: Tensor, kv_caches: list[Any]) -> Tensor:
        start = 0 if kv_caches[0] is None else kv_caches[0][0].shape[2]

        def keep(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if kv_caches[index] is not None:
                k, v = (torch.cat((old, new), 2) for old, new in zip(kv_caches[index], (k, v), strict=True))
            kv_caches[index] = (k, v)
            return k, v

        return self.run(ids, start, keep)


class OtherNames(WithCache):
    """Names of its own, a flag that asks for the cache, and an offset."""

    def forward(self, *, tokens: Tensor, offset: int = 0, remembered: Any = None, return_cache: bool = False) -> Any:
        new = []

        def keep(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if remembered is not None:
                k, v = (torch.cat((old, now), 2) for old, now in zip(remembered[index], (k, v), strict=True))
            new.append((k, v))
            return k, v

        logits = self.run(tokens, offset, keep)
        return {"scores": logits, "cache": new} if return_cache else {"scores": logits}


class LastRow(Plain):
    """(batch, vocabulary): logits of the last position alone."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[:, -1]


class NeedsPositions(Plain):
    """Positions (time,) that are not broadcast."""

    def forward(self, ids: Tensor, pos: Tensor) -> Tensor:
        assert pos.dim() == 1
        return super().forward(ids) + self.head(self.position(pos))


class TakesMask(nn.Module):
    """Causal by a mask that the caller makes; True or 1 is seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.max_seq_len = CONTEXT

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(x)
        scores = x @ x.transpose(1, 2) / 8
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return self.head(scores.softmax(-1) @ x)


class Encoder(nn.Module):
    """PyTorch's layers, for which True is hidden."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, src: Tensor, src_mask: Tensor) -> Tensor:
        return self.head(self.layers(5 * self.embedding(src), src_mask))


class VocabularySecond(Plain):
    """Logits as cross_entropy takes them, after hidden states of the same number of axes."""

    def forward(self, ids: Tensor) -> Any:
        return self.embed(ids, 0), super().forward(ids).transpose(1, 2)


class VocabularySecondWithCache(WritesIntoList):
    """The same with a cache, and nothing before."""

    def forward(self, ids: Tensor, kv_caches: list[Any]) -> Tensor:
        return super().forward(ids, kv_caches).transpose(1, 2)


class OneRow(WithCache):
    """A batch of one only, with a cache of its own."""

    def forward(self, ids: Tensor, past_kv: Any = None) -> Any:
        assert len(ids) == 1, "one at a time"
        new: list[Any] = []

        def keep(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if past_kv is not None:
                k, v = (torch.cat((old, now), 2) for old, now in zip(past_kv[index], (k, v), strict=True))
            new.append((k, v))
            return k, v

        return self.run(ids, 0 if past_kv is None else past_kv[0][0].shape[2], keep), new


class OneSequence(OneRow):
    """Ids (time,), and no axis for a batch anywhere."""

    def forward(self, ids: Tensor, past_kv: Any = None) -> Any:
        (length,) = ids.shape
        past = None if past_kv is None else [(k[None], v[None]) for k, v in past_kv]
        logits, new = super().forward(ids[None], past)
        assert logits.shape == (1, length, VOCABULARY)
        return logits[0], [(k[0], v[0]) for k, v in new]


class OneSequenceLast(Plain):
    """Ids (time,), logits (vocabulary,)."""

    def forward(self, ids: Tensor) -> Tensor:
        (_,) = ids.shape
        return super().forward(ids[None])[0, -1]


class OneSequenceRNN(CharacterRNN):
    """Ids (time,), and a first state for them."""

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> Any:
        (_,) = x.shape
        logits, (h, c) = super().forward(x[None], (hidden[0][:, None], hidden[1][:, None]))
        return logits, (h[:, 0], c[:, 0])

    def init_hidden(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return torch.zeros(2, 24), torch.zeros(2, 24)


def seen(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


# module, its last logits of ids (1, time) by hand, the style of its cache
KINDS: dict[str, tuple[type[nn.Module], Callable[[Any, Tensor], Tensor], type | None]] = {
    "first state by a method": (CharacterRNN, lambda m, ids: m(ids, m.init_hidden(1))[0][-1], NestedStyle),
    "time first, one axis": (WordModel, lambda m, ids: m(ids.T, m.init_hidden(1))[0][-1], NestedStyle),
    "time first": (TimeFirst, lambda m, ids: m(ids.T)[-1, 0], None),
    "mapping changed in place": (WritesIntoMapping, lambda m, ids: m(ids)[0, -1], GivenStyle),
    "list changed in place": (WritesIntoList, lambda m, ids: m(ids, [None] * len(m.layers))[0, -1], GivenStyle),
    "names of its own": (OtherNames, lambda m, ids: m(tokens=ids)["scores"][0, -1], NestedStyle),
    "last row": (LastRow, lambda m, ids: m(ids)[0], None),
    "vocabulary second": (VocabularySecond, lambda m, ids: m(ids)[1][0, :, -1], None),
    "vocabulary second, list changed in place": (
        VocabularySecondWithCache,
        lambda m, ids: m(ids, [None] * len(m.layers))[0, :, -1],
        GivenStyle,
    ),
    "one row": (OneRow, lambda m, ids: m(ids)[0][0, -1], NestedStyle),
    "one sequence": (OneSequence, lambda m, ids: m(ids[0])[0][-1], NestedStyle),
    "one sequence, last row": (OneSequenceLast, lambda m, ids: m(ids[0]), None),
    "one sequence, first state by a method": (
        OneSequenceRNN,
        lambda m, ids: m(ids[0], m.init_hidden())[0][-1],
        NestedStyle,
    ),
    "positions": (NeedsPositions, lambda m, ids: m(ids, torch.arange(ids.shape[1]))[0, -1], None),
    "mask of what is seen": (TakesMask, lambda m, ids: m(ids, seen(ids))[0, -1], None),
    "mask of what is hidden": (Encoder, lambda m, ids: m(ids, ~seen(ids))[0, -1], None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*has no cache that can be used")
def test_a_module_generates_what_a_loop_by_hand_does(kind: str) -> None:
    make, last_logits, style = KINDS[kind]
    module = make().eval()
    wanted = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                ids.append(int(last_logits(module, torch.tensor([ids])).argmax()))
        wanted.append(ids)
    with InferenceEngine(module) as engine:
        cache = engine.model.calls.abilities.cache
        assert (None if cache is None else type(cache.style)) is style
        assert engine.generate(PROMPTS, max_new_tokens=NEW) == wanted
        assert [engine.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS] == wanted
        best, second = engine.generate([PROMPTS[0]], num_beams=3, n=2, max_new_tokens=NEW)[0]
        assert best != second and best[:3] == second[:3] == PROMPTS[0]


@pytest.mark.parametrize("base", [Plain, OneRow, PastArgument])
@pytest.mark.filterwarnings("ignore:.*has no cache that can be used")
def test_a_module_of_few_sequences_gets_smaller_calls(base: Any) -> None:
    sizes: list[int] = []

    class Few(base):  # type: ignore[misc]
        def forward(self, ids: Tensor, *args: Any, **more: Any) -> Any:
            sizes.append(len(ids))
            if len(ids) > 3:
                raise RuntimeError("three at most")
            return super().forward(ids, *args, **more)

    Few.forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    prompts = [[1 + number, 2, 3] for number in range(7)]
    with InferenceEngine(base()) as engine:
        wanted = engine.generate(prompts, max_new_tokens=NEW)
        beams = engine.generate(prompts[0], num_beams=5, max_new_tokens=NEW)
    with InferenceEngine(Few()) as engine:
        sizes.clear()
        assert engine.generate(prompts, max_new_tokens=NEW) == wanted
        assert engine.generate(prompts[0], num_beams=5, max_new_tokens=NEW) == beams
        assert sum(size > 3 for size in sizes) <= 4  # until it is known


@pytest.mark.filterwarnings("ignore:.*has no cache that can be used")
def test_a_sequence_that_fails_is_not_taken_for_a_limit() -> None:
    class Fails(Plain):
        def forward(self, ids: Tensor) -> Tensor:
            sizes.append(len(ids))
            if armed and (ids == 28).any():
                raise RuntimeError("a token it does not know")
            return super().forward(ids)

    module, sizes, armed = Fails(), [], False
    with InferenceEngine(module) as engine:
        armed = True
        handles = [engine.submit([number, 2, 3], max_new_tokens=NEW, bad_words_ids=[[28]]) for number in (1, 5, 28, 7)]
        ends = []
        for handle in handles:
            try:
                ends.append(handle.result().finish_reason)
            except ModelError as error:
                ends.append(str(error)[:5])
        assert ends == ["length", "length", "Fails", "length"]
        sizes.clear()
        engine.generate([[1, 2, 3], [5, 2, 3], [6, 2, 3]], max_new_tokens=NEW, bad_words_ids=[[28]])
        assert max(sizes) == 3


def test_a_module_that_no_mask_makes_causal_is_refused() -> None:
    class Ignores(TakesMask):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    with pytest.raises(ModelError, match=r"Ignores\.forward\(x: .*mask.* is not causal"):
        adapt(Ignores())


def test_the_error_of_the_plainest_call_is_told() -> None:
    class Refuses(WritesIntoList):
        def forward(self, ids: Tensor, kv_caches: list[Any]) -> Tensor:
            raise ValueError(f"no good: {kv_caches}")

    with warnings.catch_warnings(), pytest.raises(ModelError, match="raised ValueError: no good: None"):
        warnings.simplefilter("error")
        adapt(Refuses())

    class Fails(Plain):
        def forward(self, ids: Tensor) -> Tensor:
            raise ValueError(f"no good: {tuple(ids.shape)}")

    with pytest.raises(ModelError, match=r"raised ValueError: no good: \(1, 6\)"):
        adapt(Fails())


def test_other_axes_make_no_other_module_causal() -> None:
    class Looks(TakesMask):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(1, 2)

    with pytest.raises(ModelError, match=r"Looks\.forward\(x: .*is not causal"):
        adapt(Looks())
