"""Small causal PyTorch modules in the styles that people write, for the tests of the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.models.foreign.cached_attention import CachedAttention, KVCache

VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT = 29, 32, 4, 2, 64


def causal_mask(new: int, total: int) -> Tensor:
    return torch.arange(total)[None, :] <= torch.arange(total - new, total)[:, None]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, remember: Any, mask: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        k, v = remember(k, v)
        causal = causal_mask(time, k.shape[2])
        allowed = causal if allowed is None else causal & allowed
        if mask is not None:
            allowed = allowed & mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.mlp(self.norm2(x))


class Base(nn.Module):
    max_seq_len = CONTEXT

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def embed(self, ids: Tensor, start: int, positions: Tensor | None = None) -> Tensor:
        where = torch.arange(start, start + ids.shape[1]) if positions is None else positions
        return self.embedding(ids) + self.position(where)


class Plain(Base):
    """forward(ids) -> logits: no cache."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids, 0)
        for layer in self.layers:
            x = layer(x, lambda k, v: (k, v))
        return self.head(self.norm(x))


class LastOnly(Plain):
    """Like nanoGPT: (logits of the last position, loss)."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        return super().forward(idx)[:, -1:], None


class PastArgument(Base):
    """model(x, use_cache=True, past_kv=past_kv) -> logits, past_kv."""

    def forward(self, x: Tensor, use_cache: bool = False, past_kv: Any = None) -> Any:
        start = past_kv[0][0].shape[2] if past_kv else 0
        hidden, present = self.embed(x, start), []
        for index, layer in enumerate(self.layers):

            def remember(k: Tensor, v: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
                if past_kv:
                    k, v = torch.cat((past_kv[index][0], k), 2), torch.cat((past_kv[index][1], v), 2)
                present.append((k, v))
                return k, v

            hidden = layer(hidden, remember)
        logits = self.head(self.norm(hidden))
        return (logits, present) if use_cache else logits


class Masked(Base):
    """Like PastArgument, but also takes attention_mask and position_ids: caches of different lengths run together."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Any = None,
        use_cache: bool = False,
    ) -> dict[str, Any]:
        start = past[0][0].shape[2] if past else 0
        hidden, present = self.embed(input_ids, start, position_ids), []
        for index, layer in enumerate(self.layers):

            def remember(k: Tensor, v: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
                if past:
                    k, v = torch.cat((past[index][0], k), 2), torch.cat((past[index][1], v), 2)
                present.append((k, v))
                return k, v

            hidden = layer(hidden, remember, attention_mask)
        return {"logits": self.head(self.norm(hidden)), "past": present}


class WrongCache(PastArgument):
    """Its cache ignores the positions: cached logits are wrong."""

    def embed(self, ids: Tensor, start: int, positions: Tensor | None = None) -> Tensor:
        return super().embed(ids, 0, positions)


class TakesKVCache(Base):
    """forward(ids, kv_cache=KVCache)."""

    def forward(self, ids: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        x = self.embed(ids, kv_cache.length if kv_cache else 0)
        for index, layer in enumerate(self.layers):
            x = layer(x, lambda k, v, index=index: kv_cache.update(index, k, v) if kv_cache else (k, v))
        return self.head(self.norm(x))


class WithCachedAttention(nn.Module):
    """Built from `CachedAttention`; causal by its own mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(CachedAttention(WIDTH, HEADS) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1.5)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        time = input_ids.shape[1]
        positions = torch.arange(time) if position_ids is None else position_ids
        x = self.embedding(input_ids) + self.position(positions)
        for layer in self.layers:
            x = x + layer(x, x, x, mask=causal_mask(time, time))[0]
        return self.head(x)


class NotCausal(Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(self.norm(x + x.mean(dim=1, keepdim=True)))


class Raises(Base):
    def forward(self, ids: Tensor) -> Tensor:
        raise RuntimeError("out of cheese")


class Rolling(Base):
    """Attends to a window, by relative distance alone, and its cache keeps the last WINDOW positions."""

    WINDOW = 16

    def forward(self, ids: Tensor, past_kv: Any = None, use_cache: bool = False) -> Any:
        hidden, present = self.embedding(ids), []
        for index, layer in enumerate(self.layers):

            def remember(k: Tensor, v: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
                if past_kv is not None:
                    k, v = torch.cat((past_kv[index][0], k), 2), torch.cat((past_kv[index][1], v), 2)
                present.append((k[:, :, -self.WINDOW :], v[:, :, -self.WINDOW :]))
                return k, v

            total = ids.shape[1] + (0 if past_kv is None else past_kv[index][0].shape[2])
            rows = torch.arange(total - ids.shape[1], total)[:, None]
            hidden = layer(hidden, remember, allowed=torch.arange(total)[None, :] > rows - self.WINDOW)
        logits = self.head(self.norm(hidden))
        return (logits, present) if use_cache else logits


class Recurrent(nn.Module):
    """An nn.LSTM or nn.GRU between embedding and head: a state of fixed size."""

    max_seq_len = CONTEXT

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.recurrent = kind(WIDTH, WIDTH, LAYERS, batch_first=True)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2)

    def forward(self, ids: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        x, hidden = self.recurrent(self.embedding(ids), hidden)
        return self.head(x), hidden


class WritesItsState(nn.Module):
    """A linear recurrence whose state is written in place, and which takes one token at a time once it has one."""

    max_seq_len = CONTEXT

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        assert state is None or tokens.shape[1] == 1
        state = torch.zeros(len(tokens), WIDTH) if state is None else state
        rows = []
        for x in self.embedding(tokens).unbind(1):
            state.mul_(self.decay).add_(x)
            rows.append(self.head(state))
        return torch.stack(rows, 1), state


class HiddenFirst(Plain):
    """(hidden states, logits)."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids, 0)
        for layer in self.layers:
            x = layer(x, lambda k, v: (k, v))
        return x, self.head(self.norm(x))


class TimeFirst(Recurrent):
    """ids (time, batch), the default of PyTorch's recurrent layers."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.T)[0].transpose(0, 1)


class RulesOut(Plain):
    """Some tokens are impossible."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        logits[..., 20:] = -torch.inf
        return logits


class Alone(PastArgument):
    """Takes one sequence per call."""

    def forward(self, x: Tensor, use_cache: bool = False, past_kv: Any = None) -> Any:
        if len(x) > 1:
            raise ValueError("a batch of more than one")
        return super().forward(x, use_cache, past_kv)


class Mixing(Plain):
    """Rows of a batch influence each other."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits - logits.amax(dim=(0, 2), keepdim=True)


class MixesStates(WritesItsState):
    """Right for one sequence; rows that continue a state get the mean of all."""

    def forward(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return super().forward(tokens, None if state is None else state.mean(0, keepdim=True).expand_as(state).clone())
