"""Mixture-of-experts feed-forward blocks: a router sends each token to a few of many gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from mnemos.models.fields import Fields
from mnemos.models.weights import Weights
from mnemos.ops.protocol import Array, Matrix, Ops

GGUF_EXPERT_NAMES = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
}


@dataclass(frozen=True)
class Routing:
    """The number and width of experts, how many a token visits, and whether their weights are scaled to sum to 1."""

    experts: int
    inner_size: int
    top_k: int
    normalise: bool


@dataclass(frozen=True)
class SparseMLP:
    """The weighted sum of each token's `top_k` most probable experts. Shazeer et al. 2017, arXiv:1701.06538."""

    router: Matrix
    gate: list[Matrix]
    up: list[Matrix]
    down: list[Matrix]
    top_k: int
    normalise: bool
    activation: str

    def __call__(self, ops: Ops, x: Array) -> Array:
        ids, weights = ops.route(x, self.router, self.top_k, self.normalise)
        return ops.experts(x, ids, weights, self.gate, self.up, self.down, self.activation)


def read_routing(fields: Fields, inner_name: str, normalise: bool) -> Routing:
    """The fields num_local_experts, num_experts_per_tok and `inner_name`, the width of one expert."""
    experts = fields.size("num_local_experts", largest=65536)
    return Routing(experts, fields.size(inner_name), fields.size("num_experts_per_tok", largest=experts), normalise)


def load_sparse_mlp(
    weights: Weights,
    block: str,
    hidden_size: int,
    routing: Routing,
    activation: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> SparseMLP:
    """The block `name`, such as "layers.3.mlp": experts separately under `names`, or in tensors with an expert axis.

    The latter and GGUF always use "mlp" and the usual names, in every architecture; gate and up may be fused there.
    """
    usual = block.rpartition(".")[0] + ".mlp"
    suffix = ".weight" if weights.is_gguf else ""
    fused = weights.has(f"{usual}.experts.gate_up_proj", suffix)
    name = usual if weights.is_gguf or fused else block
    count, inner = routing.experts, routing.inner_size
    wide, narrow = (count, inner, hidden_size), (count, hidden_size, inner)
    if fused:
        both = (count, 2 * inner, hidden_size)
        gate, up = (
            weights.stack(f"{name}.experts.gate_up_proj", both, take=rows, suffix=suffix)
            for rows in (slice(0, inner), slice(inner, 2 * inner))
        )
        down = weights.stack(f"{name}.experts.down_proj", narrow, suffix=suffix)
    elif weights.is_gguf:
        gate, up, down = (
            weights.stack(f"{name}.experts.{part}", shape)
            for part, shape in zip(("gate_proj", "up_proj", "down_proj"), (wide, wide, narrow), strict=True)
        )
    else:
        gate, up, down = (
            [weights.matrix(f"{name}.experts.{expert}.{part}", *shape[1:]) for expert in range(count)]
            for part, shape in zip(names, (wide, wide, narrow), strict=True)
        )
    router = weights.matrix(f"{name}.gate", count, hidden_size)
    return SparseMLP(router, gate, up, down, routing.top_k, routing.normalise, activation)
