"""`MemoryTransformer`: a decoder whose layers also attend to banks of learned memory vectors, trained from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.errors import ConfigError, RequestError
from mnemos.models.memory_transformer.attention import MemoryAttention
from mnemos.models.memory_transformer.banks import adopt_quantized, make_bank, quantize_banks
from mnemos.models.memory_transformer.config import Config, ModelConfig
from mnemos.models.memory_transformer.output import MemoryOutput
from mnemos.models.memory_transformer.reading import MemoryCall, Windows, make_routers, router_of, total_loss

Layer = tuple[Tensor, Tensor]  # keys and values (B, S, kv_heads, head_dim), rotated


class MemoryCache(list[Layer]):
    """Keys and values by layer, and the windows of states that rolling and hybrid routers choose by.

    They belong to one text, so that two that take turns on one model do not mix.
    """

    def __init__(self, layers: Sequence[Layer] = (), windows: Windows | None = None) -> None:
        super().__init__(layers)
        self.windows: Windows = windows or {}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class RotaryEmbedding(nn.Module):
    """Rotates halves of heads by their positions. Su et al. 2021, arXiv:2104.09864."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", theta ** (-torch.arange(0, head_dim, 2).float() / head_dim))
        self.inv_freq: Tensor

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, heads, head_dim) at positions (B or 1, T)."""
        angles = positions[..., None, None].float() * self.inv_freq.float()
        cos, sin = (torch.cat((part, part), dim=-1).to(x.dtype) for part in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class SelfAttention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.heads, self.kv_heads = config.hidden_dim, config.num_heads, config.kv_heads
        self.head_dim = hidden // self.heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.rotary = RotaryEmbedding(self.head_dim, config.rope_theta) if config.use_rope else None

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor | None, past: Layer | None) -> tuple[Tensor, Layer]:
        """x (B, T, hidden); visible (B or 1, 1, T, S), None: every position sees those up to its own."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = (side(x).unflatten(-1, (self.kv_heads, self.head_dim)) for side in (self.k_proj, self.v_proj))
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible,
            is_causal=visible is None and x.shape[1] > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_dim, config.intermediate_dim
        self.activation = config.hidden_activation
        if self.activation == "swiglu":
            self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, hidden)."""
        if self.activation == "swiglu":
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = ACTIVATIONS[self.activation](self.up_proj(x))
        down: Tensor = self.down_proj(inner)
        return down


class Block(nn.Module):
    """One layer. With memory, it reads its bank before its network (variant A), or after it and before another (B)."""

    def __init__(self, config: Config, layer: int, reads: bool) -> None:
        super().__init__()
        model, self.layer, self.reads = config.model, layer, reads
        self.variant = config.memory.memory_block_variant
        self.input_layernorm = _norm(model)
        self.self_attn = SelfAttention(model)
        self.post_attention_layernorm = _norm(model)
        self.mlp = FeedForward(model)
        self.dropout = nn.Dropout(model.dropout)
        if not reads:
            return
        shape = config.attention_shape(model.num_heads, model.num_kv_heads, model.hidden_dim)
        self.memory_layernorm = _norm(model)
        self.memory_attn = MemoryAttention(config, model.hidden_dim, *shape)
        rate = config.memory.memory_dropout
        self.memory_dropout = nn.Dropout(model.dropout if rate is None else rate)
        if self.variant == "B":
            self.post_memory_layernorm = _norm(model)
            self.post_memory_mlp = FeedForward(model)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        past: Layer | None,
        call: MemoryCall,
        bank: nn.Module | None,
        router: Any,
    ) -> tuple[Tensor, Layer]:
        """x (B, T, hidden)."""
        states = x
        attended, kept = self.self_attn(self.input_layernorm(x), positions, visible, past)
        x = x + self.dropout(attended)
        if bank is not None and self.variant == "A":
            x = self._read(x, states, call, bank, router)
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        if bank is not None and self.variant == "B":
            x = self._read(x, states, call, bank, router)
            x = x + self.dropout(self.post_memory_mlp(self.post_memory_layernorm(x)))
        return x, kept

    def _read(self, x: Tensor, states: Tensor, call: MemoryCall, bank: nn.Module, router: Any) -> Tensor:
        read = call.read(self.layer, self.memory_attn, bank, router, self.memory_layernorm(x), states)
        added: Tensor = x + self.memory_dropout(read)
        return added


class MemoryTransformer(nn.Module):
    """A causal language model with memory banks, as its `Config` says.

    State dicts are those of the published checkpoints. `InferenceEngine(model, tokenizer)` runs it with every strategy.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        config.check()
        if config.model.base_model_name is not None:
            raise ConfigError(
                f"model.base_model_name is {config.model.base_model_name!r}; it must be null for a model of its own: "
                "use MemoryAdapter for memory on a pretrained one"
            )
        self.config = config
        model, memory = config.model, config.memory
        self.bank_of_layer, banks = memory.banks(model.num_layers)
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_dim)
        self.layers = nn.ModuleList(Block(config, i, i in self.bank_of_layer) for i in range(model.num_layers))
        self.memory_banks = nn.ModuleList(make_bank(config, model.hidden_dim) for _ in range(banks))
        self.routers = make_routers(memory, model.hidden_dim, self.bank_of_layer)
        self.norm = _norm(model)
        self.lm_head = nn.Linear(model.hidden_dim, model.vocab_size, bias=False)
        self._initialize()
        self.register_load_state_dict_pre_hook(adopt_quantized)  # type: ignore[no-untyped-call]
        if model.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _initialize(self) -> None:
        model, memory = self.config.model, self.config.memory
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=model.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():  # after all linear layers, their own included
            if isinstance(module, SelfAttention) and model.self_attn_wo_init_std is not None:
                nn.init.normal_(module.o_proj.weight, std=model.self_attn_wo_init_std)
            if isinstance(module, FeedForward) and model.mlp_down_proj_init_std is not None:
                nn.init.normal_(module.down_proj.weight, std=model.mlp_down_proj_init_std)
            if isinstance(module, MemoryAttention) and memory.wo_init_zero:
                nn.init.zeros_(module.last.weight)

    def quantize_memory(self, bits: int) -> None:
        """Replaces the banks by ones of 8 or 4 bits, which cannot be trained."""
        quantize_banks(self.memory_banks, bits)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Sequence[Layer] | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        position_offset: int | None = None,
    ) -> MemoryOutput:
        """Logits of input_ids (B, T), which follow those that `past_key_values` come from.

        attention_mask (B, S) is over all S positions, 1 where one counts. position_ids (T,) or (B, T) count from
        position_offset by default, without an offset from the end of the past. labels (B, T): the loss too, with the
        routers' in training. RequestError for a mask of another length, or positions below 0.
        """
        past = past_key_values or None
        held = 0 if past is None else past[0][0].shape[1]
        length = input_ids.shape[1]
        shape = (len(input_ids), held + length)
        if attention_mask is not None and attention_mask.shape != shape:
            raise RequestError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {shape}, over all positions so far"
            )
        positions = self._positions(input_ids, position_ids, held if position_offset is None else position_offset)
        visible = _visible(length, held, attention_mask, input_ids.device)
        windows = None if past is None else getattr(past, "windows", {})
        call = MemoryCall(self.config.memory, self.training, use_cache, windows, attention_mask)
        x = self.embed_tokens(input_ids)
        kept = MemoryCache()
        for i, layer in enumerate(self.layers):
            number = self.bank_of_layer.get(i)
            bank = None if number is None else self.memory_banks[number]
            x, cell = layer(
                x, positions, visible, None if past is None else past[i], call, bank, router_of(self.routers, i)
            )
            kept.append(cell)
        kept.windows = call.kept
        hidden = self.norm(x)
        logits = self.lm_head(hidden)
        return MemoryOutput(
            loss=None if labels is None else total_loss(logits, labels, call),
            logits=logits,
            past_key_values=kept if use_cache else None,
            hidden=hidden,
            routes=call.routes or None,
        )

    def _positions(self, input_ids: Tensor, position_ids: Tensor | None, offset: int) -> Tensor:
        if position_ids is None:
            return torch.arange(offset, offset + input_ids.shape[1], device=input_ids.device)[None]
        if position_ids.min() < 0:
            raise RequestError(f"position_ids has {int(position_ids.min())}; positions must be at least 0")
        return position_ids if position_ids.dim() == 2 else position_ids[None]


def _visible(length: int, held: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, T, S): which positions each one sees; None where that is all up to its own.

    A position that sees none, which only padding can be, sees all instead: its result is meaningless, but a number.
    """
    if mask is None and (held == 0 or length == 1):
        return None
    visible = torch.ones(length, held + length, dtype=torch.bool, device=device).tril(held)[None, None]
    if mask is not None:
        visible = visible & (mask != 0)[:, None, None]
        visible = visible | ~visible.any(-1, keepdim=True)
    return visible


def _norm(config: ModelConfig) -> nn.Module:
    kind = nn.RMSNorm if config.use_rms_norm else nn.LayerNorm
    return kind(config.hidden_dim, eps=config.norm_eps)
