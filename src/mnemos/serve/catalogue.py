"""The models that a server offers: found by name, loaded on first use, unloaded when idle or when memory is short."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, ConfigError, MnemosError
from mnemos.serve.refusal import Refusal

logger = logging.getLogger("mnemos.serve")
FOREVER = float("inf")
PREPARING = 4  # threads that read a model's prompts
T = TypeVar("T")
Watch = Callable[[str, InferenceEngine], Callable[[], None]]


@dataclass(frozen=True)
class Offer:
    """A model under the name that requests use.

    make        loads its engine; called in a worker thread
    aliases     further names
    defaults    fields of GenerationConfig for requests that do not set them
    keep_alive  seconds without a request after which it is unloaded
    loaded      an engine that the program made itself, which the server neither loads nor closes
    source      what the model was loaded from; never shown to clients
    adapters    names of its LoRA adapters, under which requests reach it with one of them
    """

    name: str
    make: Callable[[], InferenceEngine]
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keep_alive: float = FOREVER
    loaded: InferenceEngine | None = None
    source: str | None = None
    adapters: tuple[str, ...] = ()


def given(engine: InferenceEngine, name: str) -> Offer:
    """The offer of an engine that the program made itself. ConfigError for anything else."""
    if not isinstance(engine, InferenceEngine):
        raise ConfigError(f"the model {name!r} is a {type(engine).__name__}; it must be an InferenceEngine")
    return Offer(name, lambda: engine, loaded=engine, adapters=engine.spec.adapters)


class Served:
    """An offered model and, while it is loaded, its engine."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.name = offer.name
        self.created = int(time.time())
        self.loading = asyncio.Lock()
        self.users = 0
        self.last_used = time.monotonic()
        self.keep_alive = offer.keep_alive
        self.ends: Counter[str] = Counter()  # finished results by their reason
        self.watch: Watch | None = None
        self._unwatch: Callable[[], None] | None = None
        self.error: Refusal | None = None  # why the last attempt to load it failed
        self._engine = offer.loaded
        self._threads = ThreadPoolExecutor(PREPARING, "mnemos-prompts")

    @property
    def loaded(self) -> bool:
        """True while the engine is there."""
        return self._engine is not None

    @property
    def engine(self) -> InferenceEngine:
        """The engine; only inside `Catalogue.use`, or after a look at `loaded`."""
        if self._engine is None:
            raise MnemosError(f"the model {self.name} is not loaded")
        return self._engine

    async def in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Reads prompts in a worker thread: one of a few, since the others would only wait for the interpreter."""
        run = partial(copy_context().run, work, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def load(self) -> None:
        """Makes the engine; blocks while files are read."""
        self._engine = self.offer.make()
        self.observe()

    def observe(self) -> None:
        """Lets the watcher see the engine, if there are both."""
        if self.watch is not None and self._engine is not None:
            self._unwatch = self.watch(self.name, self._engine)

    def unload(self) -> None:
        """Closes the engine, which no request may be using."""
        engine, self._engine = self._engine, None
        if self._unwatch is not None:
            self._unwatch()
        if engine is not None:
            engine.close()


class Adapted(Served):
    """A served model with one of its adapters: the same engine, under the adapter's name."""

    def __init__(self, base: Served, adapter: str) -> None:
        defaults = {**base.offer.defaults, "adapter": adapter}
        super().__init__(replace(base.offer, name=adapter, aliases=(), adapters=(), defaults=defaults, loaded=None))
        self.base = base
        self.ends, self._threads = base.ends, base._threads

    @property
    def loaded(self) -> bool:
        """As for the base."""
        return self.base.loaded

    @property
    def engine(self) -> InferenceEngine:
        """The base's."""
        return self.base.engine


class Catalogue:
    """The models on offer. Used in the event loop only; loading and closing happen in worker threads."""

    def __init__(self, offers: Iterable[Offer], default: str | None = None) -> None:
        listed = list(offers)
        for offer in listed:
            if not isinstance(offer, Offer):
                raise ConfigError(f"models holds a {type(offer).__name__}; it must hold Offers")
        self.models = [Served(offer) for offer in listed]
        if not self.models:
            raise ConfigError("models is empty; a server needs at least one")
        self._by_name: dict[str, Served] = {}
        for model in self.models:
            for name in (model.name, *model.offer.aliases):
                if name in self._by_name:
                    raise ConfigError(f"two models are called {name!r}; give each its own name or alias")
                self._by_name[name] = model
        self.adapted = [Adapted(model, name) for model in self.models for name in model.offer.adapters]
        for variant in self.adapted:
            if variant.name in self._by_name:
                raise ConfigError(f"two models or adapters are called {variant.name!r}; give each its own name")
            self._by_name[variant.name] = variant
        if default is not None and default not in self._by_name:
            raise ConfigError(f"default is {default!r}; it must be one of {', '.join(self._by_name)}")
        only = self.models[0] if len(self.models) == 1 else None
        self.default = only if default is None else self._by_name[default]

    def find(self, name: str | None) -> Served:
        """The model of this name, or the default one without a name. Names are never paths."""
        if not name:
            if self.default is None:
                raise Refusal(400, f"model is missing; it must be one of {self._names()}", param="model")
            return self.default
        known = self._by_name.get(name) or self._by_name.get(re.sub(r":latest$", "", name))
        if known is None:
            raise Refusal(
                404,
                f"The model {name[:80]!r} does not exist; the models here are {self._names()}",
                param="model",
                code="model_not_found",
            )
        return known

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """The model of this name with its engine, which is not unloaded inside the block."""
        found = self.find(name)
        model = found.base if isinstance(found, Adapted) else found
        model.users += 1
        try:
            if not model.loaded:
                await self._load(model)
            yield found
        finally:
            model.users -= 1
            model.last_used = time.monotonic()

    def observe(self, watch: Watch) -> None:
        """Calls `watch` with the name and the engine of each model that is loaded, now and later.

        What it returns is called when the model is unloaded.
        """
        for model in self.models:
            model.watch = watch
            model.observe()

    async def load(self, name: str | None) -> None:
        """Loads a model ahead of its first request."""
        async with self.use(name):
            pass

    async def unload(self, model: Served) -> bool:
        """Unloads a model unless it is in use; True if it is unloaded now."""
        async with model.loading:
            if model.users or model.offer.loaded is not None:
                return False
            await asyncio.to_thread(model.unload)
        logger.info("unloaded", extra={"model": model.name})
        return True

    async def unload_idle(self) -> None:
        """Unloads what nobody has used for its keep-alive time."""
        now = time.monotonic()
        for model in self.models:
            if model.loaded and not model.users and now - model.last_used >= model.keep_alive:
                await self.unload(model)

    def close(self) -> None:
        """Closes all engines that the catalogue made; their requests end with an error."""
        for model in self.models:
            if model.offer.loaded is None:
                model.unload()

    async def _load(self, model: Served) -> None:
        async with model.loading:
            if model.loaded:
                return
            started = time.perf_counter()
            while True:
                try:
                    await asyncio.to_thread(model.load)
                    break
                except (CapacityError, MemoryError) as error:
                    if not await self._make_room(model):
                        raise self._failed(model, error) from error
                except (MnemosError, OSError) as error:
                    raise self._failed(model, error) from error
        model.error = None
        logger.info("loaded", extra={"model": model.name, "seconds": round(time.perf_counter() - started, 3)})

    async def _make_room(self, model: Served) -> bool:
        """Unloads the model that was used least recently, of those that nobody uses now."""
        idle = [other for other in self.models if other is not model and other.loaded and not other.users]
        for other in sorted(idle, key=lambda one: one.last_used):
            if await self.unload(other):
                return True
        return False

    def _failed(self, model: Served, error: BaseException) -> Refusal:
        logger.error("loading failed: %s", error, extra={"model": model.name})
        model.error = Refusal(
            503, f"the model {model.name} cannot be loaded now; the server's log says why", code="model_unavailable"
        )
        return model.error

    def _names(self) -> str:
        return ", ".join(model.name for model in (*self.models, *self.adapted))
