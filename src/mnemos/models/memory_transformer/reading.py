"""One call of a model: how its memory layers are routed, what they read, and what is kept of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mnemos.models.memory_transformer.attention import MemoryAttention, attend_by_token, attend_to_chapters
from mnemos.models.memory_transformer.config import MemorySettings
from mnemos.models.memory_transformer.routing import ChapterRouter, Route, pool, total_router_loss

Windows = dict[int, Tensor]  # for each memory layer, the states (B, n, H) of the text's latest positions


@dataclass
class MemoryCall:
    """A forward call. windows: those of the text's earlier calls, None in its first; afterwards `kept` are its own.

    cached: keys and values are kept. mask: (B, S), 1 where positions count, None: all do.
    """

    settings: MemorySettings
    training: bool
    cached: bool
    windows: Windows | None = None
    mask: Tensor | None = None
    kept: Windows = field(default_factory=dict)
    routes: dict[int, Route] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """The routing strategy in force."""
        settings = self.settings
        name = settings.routing_strategy_train if self.training else settings.routing_strategy_inference
        return name.replace("_", "-")

    def read(
        self,
        layer: int,
        attention: MemoryAttention,
        bank: nn.Module,
        router: ChapterRouter | None,
        x: Tensor,
        states: Tensor,
    ) -> Tensor:
        """What layer number `layer` reads for x (B, T, hidden); a router chooses by `states` (B, T, hidden)."""
        if router is None:
            read: Tensor = self._checkpointed(attention, x, bank())
            return read
        settings, strategy = self.settings, self.strategy
        shared = settings.num_shared_chapters
        if strategy == "token":
            route = router.route(states, self.training, shared)
            self.routes[layer] = Route(route.indices - shared, route.weights, route.losses)
            read = self._checkpointed(attend_by_token, attention, x, bank(), route, settings)
            return read
        held = None if self.windows is None else self.windows.get(layer)
        pooled, recent = pool(
            strategy, states, settings.routing_window_size, cached=self.cached, held=held, mask=self.mask
        )
        if recent is not None:
            self.kept[layer] = recent
        read, self.routes[layer] = self._checkpointed(
            attend_to_chapters, attention, x, bank(), router.route(pooled, self.training, shared), settings
        )
        return read

    def _checkpointed(self, function: Any, *arguments: Any) -> Any:
        """The function's result; in training, with its inner results computed again for the gradients if so wanted."""
        if self.training and torch.is_grad_enabled() and self.settings.memory_gradient_checkpointing:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def router_loss(self) -> Tensor | None:
        """The enabled router losses with their coefficients, averaged over the memory layers; None without any."""
        settings = self.settings
        enabled = {
            "load_balance": (settings.use_load_balance_loss, settings.load_balance_coefficient),
            "auxiliary": (settings.use_auxiliary_loss, settings.auxiliary_loss_coefficient),
            "z_loss": (settings.use_z_loss, settings.z_loss_coefficient),
        }
        coefficients = {name: factor for name, (wanted, factor) in enabled.items() if wanted}
        losses = [route.losses for route in self.routes.values() if route.losses]
        if not losses or not coefficients:
            return None
        return torch.stack([total_router_loss(part, coefficients) for part in losses]).mean()


def make_routers(settings: MemorySettings, hidden: int, layers: Iterable[int]) -> nn.ModuleDict:
    """A router for each memory layer, by its number; none without chapters."""
    if not settings.use_chapters:
        return nn.ModuleDict()
    return nn.ModuleDict(
        {str(i): ChapterRouter(hidden, settings.num_chapters, settings.top_k_chapters) for i in layers}
    )


def router_of(routers: nn.ModuleDict, layer: int) -> ChapterRouter | None:
    """The router of a layer, None without chapters."""
    name = str(layer)
    router = routers[name] if name in routers else None  # noqa: SIM401  a ModuleDict has no `get`
    assert router is None or isinstance(router, ChapterRouter)
    return router


def total_loss(logits: Tensor, labels: Tensor, call: MemoryCall) -> Tensor:
    """Next-token cross-entropy plus the router losses; labels (B, T) are shifted here, and -100 is ignored."""
    loss = nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
    )
    extra = call.router_loss()
    return loss if extra is None else loss + extra
