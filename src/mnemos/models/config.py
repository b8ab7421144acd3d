"""The hyperparameters that architectures share, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mnemos.models.activations import read_activation
from mnemos.models.fields import Fields
from mnemos.models.rope import Rope, context_in_use, read_rope

# Larger values mean a damaged field; the check comes before anything of that size is allocated.
MOST_LAYERS = 100_000
WIDEST_HEAD = 65_536
FARTHEST_POSITION = 131_072  # rotary tables grow with positions, and their angles are float32
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Hyperparameters of every architecture, with Hugging Face's names; `context_length` is the one in use."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    windows: tuple[int, ...]  # for each layer, how many positions back attention reaches, 0 without a limit
    tie_word_embeddings: bool

    @property
    def position_limit(self) -> int:
        """See ModelSpec: with rotary embeddings, attention depends on distances only."""
        return max(FARTHEST_POSITION, 2 * self.context_length)


@dataclass(frozen=True, kw_only=True)
class GatedDecoderConfig(DecoderConfig):
    """The additions of Llama and its relatives: RMS norms, rotary embeddings and a gated MLP."""

    intermediate_size: int
    rms_norm_eps: float
    hidden_act: str  # one of mnemos.ops.protocol.ACTIVATIONS
    rope: Rope


def read_shape(
    fields: Fields,
    *,
    head_dim: int | None = None,
    slides: Callable[[int], bool] = lambda layer: True,
    tied: bool = False,
) -> dict[str, Any]:
    """The values of DecoderConfig's fields; FormatError if one is missing or impossible.

    head_dim: the default if the config has none (else hidden size / heads). slides: which layers have the sliding
    window, if there is one and the config does not list the layers' types. tied: whether the output projection is the
    embedding if the config does not say.
    """
    hidden = fields.size("hidden_size")
    layers = fields.size("num_hidden_layers", largest=MOST_LAYERS)
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of the {heads} attention heads")
    if fields.get("head_dim") is None and head_dim is None:
        if hidden % heads:
            raise fields.wrong("num_attention_heads", f"a divisor of the hidden size {hidden}")
        head_dim = hidden // heads
        if head_dim > WIDEST_HEAD:
            raise fields.wrong("num_attention_heads", f"heads of at most {WIDEST_HEAD} elements")
    return {
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": fields.size("head_dim", head_dim, largest=WIDEST_HEAD),
        "context_length": context_in_use(fields),
        "windows": _read_windows(fields, layers, slides),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", tied),
    }


def read_gated_decoder(
    fields: Fields,
    shape: dict[str, Any],
    *,
    epsilon: float = 1e-6,
    activation: str = "silu",
    theta: float = 10000.0,
    inner_size: int | None = None,
) -> dict[str, Any]:
    """`shape` (from `read_shape`) and the values of GatedDecoderConfig's own fields.

    The other arguments are the defaults for fields that a config.json leaves out; GGUF files always have an epsilon
    and, with `inner_size` None, an intermediate size. Errors: FormatError.
    """
    return {
        **shape,
        "intermediate_size": fields.size("intermediate_size", inner_size),
        "rms_norm_eps": fields.number("rms_norm_eps", None if fields.is_gguf else epsilon, most=1.0),
        "hidden_act": read_activation(fields, "hidden_act", activation),
        "rope": read_rope(fields, shape["head_dim"], theta=theta),
    }


def read_pattern(fields: Fields, layers: int, default: int) -> Callable[[int], bool]:
    """Which layers slide, from `sliding_window_pattern`: all but every n-th, or those marked in a list of booleans.

    default: n if the config has no such field.
    """
    pattern = fields.get("sliding_window_pattern")
    if isinstance(pattern, list) and len(pattern) == layers and all(isinstance(slides, bool) for slides in pattern):
        return lambda layer: pattern[layer]
    period = fields.size("sliding_window_pattern", default)
    return lambda layer: (layer + 1) % period != 0


def _read_windows(fields: Fields, layers: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    window = fields.size("sliding_window", 0, least=0) if fields.flag("use_sliding_window", True) else 0
    types = fields.get("layer_types")
    if types is None:
        return tuple(window if slides(layer) else 0 for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
        raise fields.wrong("layer_types", f"a list of {layers} names out of {', '.join(LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
