"""Chapter routing in a generation loop of your own: one object for each strategy, over a trained router.

The engine routes by itself, as a model's config says. `mnemos.models.memory_transformer.routing` explains the
strategies.
A router is a `ChapterRouter`, as in `model.routers["0"]`, or any object whose `router` is a linear layer (C, H). Every
`route(hidden_states)` of states (B, T, H) returns (indices, weights), (B, top_k) each: weights are the chosen chapters'
probabilities divided by their sum, and of equally probable chapters the lower number comes first. No chapter counts as
shared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mnemos.errors import ConfigError
from mnemos.models.memory_transformer.routing import choose, rolling_mean
from mnemos.rules import COUNT, hint

DEFAULT_WINDOW = 128


class SequenceLevelRouter:
    """By the mean of all positions of the call."""

    def __init__(self, router: Any, top_k: int) -> None:
        self.router = router
        linear = getattr(router, "router", router)
        if not isinstance(getattr(linear, "weight", None), Tensor) or linear.weight.dim() != 2:
            raise ConfigError(
                f"router is a {type(router).__name__}; expected one of the model's, such as model.routers['0'], "
                "or a linear layer from states to chapters"
            )
        chapters = linear.weight.shape[0]
        if COUNT.apply("top_k", top_k) > chapters:
            raise ConfigError(f"top_k is {top_k}; it must be at most the {chapters} chapters")
        self.top_k = top_k
        self._linear = linear

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) (B, top_k)."""
        return self._choose(self._checked(hidden_states).mean(1))

    def _checked(self, states: Tensor) -> Tensor:
        """The states, where they are of the form (B, T, H). ConfigError: they are not."""
        width = self._linear.weight.shape[1]
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[1] == 0 or states.shape[2] != width:
            found = tuple(states.shape) if isinstance(states, Tensor) else f"a {type(states).__name__}"
            raise ConfigError(
                f"hidden_states is {found}; expected a tensor (batch, positions, {width}) with a position at least"
            )
        return states

    def _choose(self, states: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return choose(self._linear(states.to(self._linear.weight.dtype)), self.top_k)


class TokenLevelRouter(SequenceLevelRouter):
    """Every position by itself."""

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) (B, T, top_k)."""
        return self._choose(self._checked(hidden_states))


class SequenceRollingRouter(SequenceLevelRouter):
    """By the mean over all positions of the mean of the last `window_size` up to each."""

    def __init__(self, router: Any, top_k: int, window_size: int = DEFAULT_WINDOW) -> None:
        super().__init__(router, top_k)
        self.window_size = COUNT.apply("window_size", window_size)

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(indices, weights) (B, top_k)."""
        return self._choose(rolling_mean(self._checked(hidden_states), self.window_size))


class RollingWindowRouter(SequenceLevelRouter):
    """By the mean of the text's last `window_size` positions, which are kept from call to call in `cache` (B, n, H)."""

    def __init__(self, router: Any, top_k: int, window_size: int = DEFAULT_WINDOW) -> None:
        super().__init__(router, top_k)
        self.window_size = COUNT.apply("window_size", window_size)
        self.cache: Tensor | None = None

    def reset_cache(self) -> None:
        """Forgets the text."""
        self.cache = None

    def route(self, hidden_states: Tensor, use_cache: bool = True) -> tuple[Tensor, Tensor]:
        """(indices, weights) (B, top_k); without use_cache by the new positions alone, and none are kept."""
        hidden_states = self._checked(hidden_states)
        if use_cache and self.cache is not None:
            if len(self.cache) != len(hidden_states):
                raise ConfigError(
                    f"hidden_states is a batch of {len(hidden_states)} and the texts so far were {len(self.cache)}; "
                    "call reset_cache() before other texts"
                )
            hidden_states = torch.cat((self.cache, hidden_states), dim=1)
        recent = hidden_states[:, -self.window_size :].detach()
        if use_cache:
            self.cache = recent
        return self._choose(recent.mean(1))


class HybridRouter(RollingWindowRouter):
    """By the mean of the whole prompt; after `start_generation`, by the last positions."""

    def __init__(self, router: Any, top_k: int, window_size: int = DEFAULT_WINDOW) -> None:
        super().__init__(router, top_k, window_size)
        self.generating = False

    def start_generation(self, prefill_hidden_states: Tensor) -> None:
        """From here on, calls bring the positions that follow this prompt (B, T, H)."""
        self.cache = self._checked(prefill_hidden_states)[:, -self.window_size :].detach()
        self.generating = True

    def reset(self) -> None:
        """Forgets the text; the next call brings a prompt."""
        self.reset_cache()
        self.generating = False

    def route(self, hidden_states: Tensor, use_cache: bool = True) -> tuple[Tensor, Tensor]:
        """(indices, weights) (B, top_k)."""
        if not self.generating:
            return self._choose(self._checked(hidden_states).mean(1))
        return super().route(hidden_states, use_cache)


_STRATEGIES: dict[str, type[SequenceLevelRouter]] = {
    "sequence": SequenceLevelRouter,
    "sequence-rolling": SequenceRollingRouter,
    "rolling": RollingWindowRouter,
    "hybrid": HybridRouter,
    "token": TokenLevelRouter,
}


def create_inference_router(
    router: Any, strategy: str = "sequence", top_k: int = 4, window_size: int = DEFAULT_WINDOW
) -> Any:
    """The router object of a strategy; `window_size` is that of those with a window. ConfigError: an unknown name."""
    kind = _STRATEGIES.get(strategy.replace("_", "-") if isinstance(strategy, str) else "")
    if kind is None:
        raise ConfigError(f"strategy is {strategy!r}; {hint(str(strategy), _STRATEGIES, 'the strategies')}")
    COUNT.apply("window_size", window_size)
    return kind(router, top_k, window_size) if issubclass(kind, _WINDOWED) else kind(router, top_k)


_WINDOWED = (SequenceRollingRouter, RollingWindowRouter)
