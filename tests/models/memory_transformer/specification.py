"""What a memory-augmented transformer computes, in NumPy and float64, and configs of it at random.

A second program from the description of the models alone: it shares nothing with the package, whose modules and
backends have to agree with it.
"""

from __future__ import annotations

import random
from math import erf
from typing import Any

import numpy as np

Array = Any
Settings = dict[str, Any]

MODEL: Settings = {
    "num_kv_heads": None, "rope_theta": 10000.0, "use_rope": True, "hidden_activation": "swiglu", "norm_eps": 1e-6,
    "use_rms_norm": True, "tie_embeddings": True, "max_seq_len": 64,
}  # fmt: skip
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def normalized(x: Array, eps: float, centred: bool) -> Array:
    """RMS norm, or layer norm, without weights."""
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def random_config(seed: int) -> dict[str, Settings]:
    """The sections of a config.yaml whose values fit each other."""
    pick = random.Random(seed)
    heads, size = pick.choice([1, 2, 3, 4, 6]), pick.choice([6, 8, 12, 16])
    hidden = heads * size
    model = {
        **MODEL,
        "hidden_dim": hidden,
        "num_heads": heads,
        "num_kv_heads": pick.choice([None, *(n for n in range(1, heads + 1) if heads % n == 0)]),
        "num_layers": pick.randint(1, 4),
        "intermediate_dim": pick.choice([17, 32, 40]),
        "vocab_size": pick.choice([61, 90]),
        "rope_theta": pick.choice([1e4, 500.0]),
        "use_rope": pick.random() < 0.8,
        "hidden_activation": pick.choice(["swiglu", "swiglu", *ACTIVATIONS]),
        "norm_eps": pick.choice([1e-6, 1e-3]),
        "use_rms_norm": pick.random() < 0.7,
        "tie_embeddings": pick.random() < 0.5,
    }
    low_rank, mode = pick.random() < 0.5, pick.choice(["factorized", "reduced_dim"])
    if low_rank and mode == "reduced_dim":
        memory_heads = pick.choice([1, 2, 3, 4])
        rank = memory_heads * pick.choice([3, 4, 8])
    else:
        memory_heads, rank = pick.choice([n for n in range(1, 9) if hidden % n == 0]), pick.choice([1, 5, 16])
    chapters = pick.randint(1, 8)
    memory = {
        "wo_init_zero": False,
        "num_memory_tokens": chapters * pick.choice([1, 3, 8, 33]),
        "memory_dim": pick.choice([None, 24, 33, 80]),
        "memory_num_heads": memory_heads,
        "memory_num_kv_heads": pick.choice([n for n in range(1, memory_heads + 1) if memory_heads % n == 0]),
        "memory_layer_placement": pick.choice(["all", "first_k", "last_k", "every_n", "custom", "none"]),
        "memory_layer_k": pick.randint(1, 5),
        "memory_layer_n": pick.randint(1, 3),
        "memory_layer_indices": [pick.randint(-1, 5) for _ in range(pick.randint(1, 5))],
        "memory_sharing": pick.choice(["shared", "per_layer", "every_k_layers"]),
        "memory_sharing_k": pick.randint(1, 3),
        "memory_block_variant": pick.choice("AB"),
        "use_low_rank_memory": low_rank,
        "low_rank_mode": mode,
        "memory_rank": rank,
        "use_low_rank_projections": pick.random() < 0.3,
        "projection_rank": pick.choice([3, 5, 16]),
        "use_chapters": pick.random() < 0.7,
        "num_chapters": chapters,
        "top_k_chapters": pick.randint(1, chapters),
        "num_shared_chapters": pick.choice([0, pick.randint(0, chapters)]),
        "routed_scaling_factor": pick.choice([1.0, 0.5, 2.5, 0.0]),
        "normalize_shared_routed_before_mixing": pick.random() < 0.5,
        "shared_routed_norm_type": pick.choice(["rms", "layernorm"]),
        "shared_routed_norm_eps": pick.choice([1e-6, 1e-2]),
        "routing_strategy_inference": pick.choice(["sequence", "sequence-rolling", "rolling", "hybrid", "token"]),
        "routing_window_size": pick.choice([1, 2, 5, 128]),
    }
    return {"model": model, "memory": memory, "training": {"mixed_precision": "no"}}


class Specified:
    """A model with random weights, by name in `weights`; `forward` continues one text."""

    def __init__(self, config: dict[str, Settings], seed: int) -> None:
        self.model, self.memory = config["model"], config["memory"]
        memory, depth = self.memory, self.model["num_layers"]
        layers = {
            "all": range(depth),
            "first_k": range(min(memory["memory_layer_k"], depth)),
            "last_k": range(depth - min(memory["memory_layer_k"], depth), depth),
            "every_n": range(0, depth, memory["memory_layer_n"]),
            "custom": sorted(layer for layer in memory["memory_layer_indices"] if 0 <= layer < depth),
            "none": (),
        }[memory["memory_layer_placement"]]
        share = {"shared": depth * 9, "per_layer": 1, "every_k_layers": memory["memory_sharing_k"]}
        self.banks = {layer: number // share[memory["memory_sharing"]] for number, layer in enumerate(layers)}
        self.bank_count = -(-len(layers) // share[memory["memory_sharing"]])
        self.low_rank = memory["use_low_rank_memory"] and memory["low_rank_mode"]
        self.heads, self.kv_heads = memory["memory_num_heads"], memory["memory_num_kv_heads"]
        self.width = memory["memory_rank"] if self.low_rank == "reduced_dim" else self.model["hidden_dim"]
        random_values = np.random.default_rng(seed)
        self.weights = {
            name: _random_weight(random_values, name, shape).astype(np.float32)
            for name, shape in self._shapes().items()
        }
        if self.model["tie_embeddings"]:
            self.weights["lm_head.weight"] = self.weights["embed_tokens.weight"].copy()
        self.past: dict[int, tuple[Array, Array]] = {}
        self.windows: dict[int, Array] = {}
        self.margin = 1.0  # between the least chosen chapter and the best of the others

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        model, memory, hidden = self.model, self.memory, self.model["hidden_dim"]
        kv = hidden // model["num_heads"] * (model["num_kv_heads"] or model["num_heads"])
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(name: str) -> None:
            shapes[f"{name}.weight"] = (hidden,)
            if not model["use_rms_norm"]:
                shapes[f"{name}.bias"] = (hidden,)

        def network(name: str) -> None:
            names = ("gate_proj", "up_proj") if model["hidden_activation"] == "swiglu" else ("up_proj",)
            shapes.update({f"{name}.{part}.weight": (model["intermediate_dim"], hidden) for part in names})
            shapes[f"{name}.down_proj.weight"] = (hidden, model["intermediate_dim"])

        rank = memory["memory_rank"]
        vectors = rank if self.low_rank == "reduced_dim" else memory["memory_dim"] or hidden
        projections = {"q": (self.width, hidden), "o": (hidden, self.width)}
        projections |= {name: (self.width // self.heads * self.kv_heads, vectors) for name in "kv"}
        shapes["embed_tokens.weight"] = shapes["lm_head.weight"] = (model["vocab_size"], hidden)
        norm("norm")
        for layer in range(model["num_layers"]):
            start = f"layers.{layer}"
            norm(f"{start}.input_layernorm")
            norm(f"{start}.post_attention_layernorm")
            for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
                shapes[f"{start}.self_attn.{name}_proj.weight"] = (rows, hidden)
            network(f"{start}.mlp")
            if layer not in self.banks:
                continue
            norm(f"{start}.memory_layernorm")
            for name, (rows, columns) in projections.items():
                part = f"{start}.memory_attn.{name}"
                if memory["use_low_rank_projections"] and self.low_rank != "reduced_dim":
                    thin = memory["projection_rank"]
                    shapes |= {f"{part}_down.weight": (thin, columns), f"{part}_up.weight": (rows, thin)}
                else:
                    shapes[f"{part}_proj.weight"] = (rows, columns)
            if memory["memory_block_variant"] == "B":
                norm(f"{start}.post_memory_layernorm")
                network(f"{start}.post_memory_mlp")
            if memory["use_chapters"]:
                shapes[f"routers.{layer}.router.weight"] = (memory["num_chapters"], hidden)
                shapes[f"routers.{layer}.router.bias"] = (memory["num_chapters"],)
        for bank in range(self.bank_count):
            start, rows = self._bank_name(bank), memory["num_memory_tokens"]
            if self.low_rank == "factorized":
                shapes |= {f"{start}A": (rows, rank), f"{start}B": (vectors, rank)}
            else:
                shapes[f"{start}memory"] = (rows, vectors)
        return shapes

    def _bank_name(self, bank: int) -> str:
        return f"memory_banks.{bank}." + ("base_bank." if self.memory["use_chapters"] else "")

    def _bank(self, layer: int) -> Array:
        start = self._bank_name(self.banks[layer])
        if self.low_rank == "factorized":
            return self._weight(f"{start}A") @ self._weight(f"{start}B").T
        return self._weight(f"{start}memory")

    def _weight(self, name: str) -> Array:
        return self.weights[name].astype(np.float64)

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self._weight(f"{name}.weight").T

    def _norm(self, x: Array, name: str) -> Array:
        y = normalized(x, self.model["norm_eps"], not self.model["use_rms_norm"]) * self._weight(f"{name}.weight")
        return y if self.model["use_rms_norm"] else y + self._weight(f"{name}.bias")

    def _network(self, x: Array, name: str) -> Array:
        up, kind = self._linear(x, f"{name}.up_proj"), self.model["hidden_activation"]
        if kind == "swiglu":
            inner = ACTIVATIONS["silu"](self._linear(x, f"{name}.gate_proj")) * up
        else:
            inner = ACTIVATIONS[kind](up)
        return self._linear(inner, f"{name}.down_proj")

    def _project(self, x: Array, layer: int, name: str) -> Array:
        part = f"layers.{layer}.memory_attn.{name}"
        if f"{part}_proj.weight" in self.weights:
            return self._linear(x, f"{part}_proj")
        return self._linear(self._linear(x, f"{part}_down"), f"{part}_up")

    def forward(self, token_ids: list[int], cached: bool) -> Array:
        """Logits (tokens, vocabulary) of the next tokens of the text; without `cached`, of a text of their own."""
        model = self.model
        heads, kv_heads = model["num_heads"], model["num_kv_heads"] or model["num_heads"]
        size, count = model["hidden_dim"] // heads, len(token_ids)
        start = len(self.past[0][0]) if cached and self.past else 0
        angles = (start + np.arange(count))[:, None] * model["rope_theta"] ** (-2 * np.arange(size // 2) / size)

        def rotated(x: Array) -> Array:
            if not model["use_rope"]:
                return x
            first, second = x[..., : size // 2], x[..., size // 2 :]
            sine, cosine = np.sin(angles)[:, None], np.cos(angles)[:, None]
            return np.concatenate((first * cosine - second * sine, second * cosine + first * sine), -1)

        hidden = self._weight("embed_tokens.weight")[token_ids]
        for layer in range(model["num_layers"]):
            name, entering = f"layers.{layer}", hidden
            x = self._norm(hidden, f"{name}.input_layernorm")
            query = rotated(self._linear(x, f"{name}.self_attn.q_proj").reshape(count, heads, size))
            key = rotated(self._linear(x, f"{name}.self_attn.k_proj").reshape(count, kv_heads, size))
            value = self._linear(x, f"{name}.self_attn.v_proj").reshape(count, kv_heads, size)
            if start:
                key = np.concatenate((self.past[layer][0], key))
                value = np.concatenate((self.past[layer][1], value))
            if cached:
                self.past[layer] = key, value
            future = np.arange(len(key))[None] > start + np.arange(count)[:, None]
            seen = _attend(query, key, value, np.where(future, -np.inf, 0.0))
            hidden = hidden + self._linear(seen.reshape(count, -1), f"{name}.self_attn.o_proj")
            reads, early = layer in self.banks, self.memory["memory_block_variant"] == "A"
            if reads and early:
                hidden = hidden + self._read(layer, hidden, entering, cached, start > 0)
            hidden = hidden + self._network(self._norm(hidden, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            if reads and not early:
                hidden = hidden + self._read(layer, hidden, entering, cached, start > 0)
                x = self._norm(hidden, f"{name}.post_memory_layernorm")
                hidden = hidden + self._network(x, f"{name}.post_memory_mlp")
        return self._linear(self._norm(hidden, "norm"), "lm_head")

    def _read(self, layer: int, hidden: Array, entering: Array, cached: bool, continues: bool) -> Array:
        """What a layer's memory adds; `entering`: what the router sees."""
        memory, bank = self.memory, self._bank(layer)
        x = self._norm(hidden, f"layers.{layer}.memory_layernorm")
        query = self._project(x, layer, "q").reshape(len(x), self.heads, -1)
        if not memory["use_chapters"]:
            seen = self._attend(layer, query, bank)
        elif memory["routing_strategy_inference"] == "token":
            seen = self._by_token(layer, query, bank, entering)
        else:
            pooled = self._pooled(layer, entering, cached, continues)
            seen = self._attend(layer, query, self._gathered(layer, bank, pooled))
        return self._project(seen.reshape(len(x), -1), layer, "o")

    def _attend(self, layer: int, query: Array, vectors: Array) -> Array:
        shape = (len(vectors), self.kv_heads, -1)
        keys, values = (self._project(vectors, layer, name).reshape(shape) for name in "kv")
        return _attend(query, keys, values, 0.0)

    def _chosen(self, layer: int, states: Array) -> tuple[Array, Array]:
        """Numbers and weights (..., routed) of the chapters that are routed to."""
        shared, chapters = self.memory["num_shared_chapters"], self.memory["num_chapters"]
        count = min(self.memory["top_k_chapters"], chapters - shared)
        router = f"routers.{layer}.router"
        odds = softmax(self._linear(states, router) + self._weight(f"{router}.bias"))[..., shared:]
        odds = odds / odds.sum(-1, keepdims=True)
        order = np.argsort(-odds, -1, kind="stable")
        ranked = np.take_along_axis(odds, order, -1)
        if 0 < count < chapters - shared:
            self.margin = min(self.margin, float((ranked[..., count - 1] - ranked[..., count]).min()))
        weights = ranked[..., :count]
        return order[..., :count] + shared, weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)

    def _between_branches(self, vectors: Array) -> Array:
        memory = self.memory
        both = 0 < memory["num_shared_chapters"] < memory["num_chapters"]
        if not (memory["normalize_shared_routed_before_mixing"] and both):
            return vectors
        return normalized(vectors, memory["shared_routed_norm_eps"], memory["shared_routed_norm_type"] == "layernorm")

    def _by_token(self, layer: int, query: Array, bank: Array, states: Array) -> Array:
        shared, scale = self.memory["num_shared_chapters"], self.memory["routed_scaling_factor"]
        size = len(bank) // self.memory["num_chapters"]
        bank = self._between_branches(bank)
        numbers, weights = self._chosen(layer, states)
        seen = self._attend(layer, query, bank[: shared * size]) if shared else np.zeros_like(query)
        for row in range(len(query)):
            for number, weight in zip(numbers[row], weights[row], strict=True):
                chapter = bank[number * size : (number + 1) * size]
                seen[row] += scale * weight * self._attend(layer, query[row : row + 1], chapter)[0]
        return seen

    def _gathered(self, layer: int, bank: Array, pooled: Array) -> Array:
        """The vectors of the chapters of one text, each times its chapter's weight."""
        shared, scale = self.memory["num_shared_chapters"], self.memory["routed_scaling_factor"]
        size = len(bank) // self.memory["num_chapters"]
        numbers, weights = self._chosen(layer, pooled)
        if shared:
            numbers = np.concatenate((np.arange(shared), numbers))
            weights = np.concatenate((np.ones(shared), scale * weights))
            weights = weights / weights.sum()
        return np.concatenate(
            [
                self._between_branches(bank[number * size : (number + 1) * size]) * weight
                for number, weight in zip(numbers, weights, strict=True)
            ]
        )

    def _pooled(self, layer: int, states: Array, cached: bool, continues: bool) -> Array:
        kind, window = self.memory["routing_strategy_inference"], self.memory["routing_window_size"]
        if kind == "sequence-rolling":
            reach = min(window, len(states))
            return np.mean([states[max(0, t - reach + 1) : t + 1].mean(0) for t in range(len(states))], 0)
        if kind == "sequence" or not cached:
            return states.mean(0)
        before = [self.windows[layer]] if continues else []
        self.windows[layer] = np.concatenate([*before, states])[-window:]
        return states.mean(0) if kind == "hybrid" and not continues else self.windows[layer].mean(0)


def _attend(query: Array, key: Array, value: Array, mask: Array | float) -> Array:
    """(rows, heads, size); keys and values serve consecutive heads."""
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, 1), np.repeat(value, group, 1)
    scores = np.einsum("thd,shd->hts", query, key) * query.shape[2] ** -0.5 + mask
    return np.einsum("hts,shd->thd", softmax(scores), value)


def _random_weight(values: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    if len(shape) == 1:
        return values.normal(float(name.endswith("norm.weight")), 0.1, shape)
    return values.normal(0, 1.0 if "bank" in name else 0.2, shape)
