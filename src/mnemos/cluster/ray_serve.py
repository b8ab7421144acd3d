"""A Ray Serve application: replicas of the server, anywhere in a Ray cluster, behind the same protocols.

There are two deployments: `Front` reads a request and sends it on; `Replica` holds engines and the whole server.
`PrefixRouter` tells Ray which replica a request goes to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.types import Message

from mnemos.cluster.affinity import Affinity
from mnemos.cluster.front import Forwarded, Front, messages_of
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError
from mnemos.serve.application import app
from mnemos.serve.catalogue import Catalogue, Offer
from mnemos.serve.config_file import offer
from mnemos.serve.keys import Keys
from mnemos.serve.settings import Settings

Models = str | Mapping[str, str] | Callable[[], InferenceEngine]
MOST_ONGOING = 512  # requests that Ray gives a replica at once: its engine's own queue is fair, Ray's is not
TARGET_ONGOING = 16  # requests that one replica should have before another is started


def application(
    models: Models,
    *,
    replicas: int | tuple[int, int] = 1,
    cores: float = 1,
    settings: Settings | None = None,
    keys: Iterable[str] = (),
    api_key_file: str | None = None,
    target_ongoing_requests: float = TARGET_ONGOING,
    ray_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Application:
    """An application for `ray.serve.run`, with all protocols of `mnemos serve`.

    models: a model, several by the names that requests use, or a function that makes an engine, called in the replica.
    replicas: how many, or the fewest and the most, between which Ray chooses by the requests that run and wait.
    cores: of each replica, which Ray reserves and its engine uses. settings: of the server; host, port and TLS are
    Ray's, and a name other than localhost must be in allow_host. keys, api_key_file: API keys, whose limits count for
    each replica. target_ongoing_requests: requests per replica above which Ray starts another one. ray_options: further
    `ray_actor_options` of the replicas. options: those of `InferenceEngine.from_pretrained`.
    """
    low, high = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 0 <= low <= high or high < 1:
        raise ConfigError(
            f"replicas is {replicas!r}; it must be a whole number of at least 1, or the fewest and the most"
        )
    if callable(models) and options:
        raise ConfigError(f"models is a function, and {', '.join(options)} is set; leave it to the function")
    if cores >= 1:
        options = options if callable(models) else {"threads": int(cores), **options}
    scaling: dict[str, Any] = {"num_replicas": low}
    if low != high:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=low,
                max_replicas=high,
                initial_replicas=max(low, 1),
                target_ongoing_requests=target_ongoing_requests,
            )
        }
    chosen = settings or Settings()
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=MOST_ONGOING,
        ray_actor_options={"num_cpus": cores, **(ray_options or {})},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        graceful_shutdown_timeout_s=chosen.grace,
        **scaling,
    ).bind(models, options, chosen, tuple(keys), api_key_file)
    front = serve.deployment(
        serve.ingress(partial_front(chosen))(),
        name="Front",
        max_ongoing_requests=chosen.max_connections,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replica)


def partial_front(settings: Settings) -> Callable[[], Front]:
    """A function that makes the front inside its own process, where the replicas' handle is known."""

    def make() -> Front:
        handle = serve.get_deployment_handle("Replica", serve.get_replica_context().app_name)
        replicas = handle.options(method_name="answer", stream=True)

        async def answer(request: Forwarded) -> AsyncIterator[Message]:
            response = replicas.remote(request.prompt, request.scope, request.body)
            try:
                async for messages in response:
                    for message in messages:
                        yield message
            finally:
                response.cancel()

        return Front(answer, settings)

    return make


class Replica:
    """Engines with the whole server around them, which answers requests that the front sends on."""

    def __init__(
        self,
        models: Models,
        options: Mapping[str, Any],
        settings: Settings,
        keys: tuple[str, ...],
        api_key_file: str | None,
    ) -> None:
        catalogue = Catalogue(offers_of(models, options))
        self._guard = app(catalogue, settings=settings, keys=Keys(keys, settings.share_cache, api_key_file))
        self._lifespan = AsyncExitStack()
        self._started = False
        for model in catalogue.models:  # a replica that is ready has its models
            model.load()

    async def answer(self, prompt: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The ASGI messages that answer a request, as many at once as there are. prompt: what Ray routed it by."""
        if not self._started:
            self._started = True
            inner: Any = self._guard.app
            await self._lifespan.enter_async_context(inner.router.lifespan_context(inner))
        async for messages in messages_of(self._guard, scope, body):
            yield messages


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that has read the beginning of its prompt; see `Affinity`."""

    def initialize_state(self) -> None:
        """Called by Ray once."""
        self._affinity = Affinity()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates, best first, each in a group of its own: Ray takes the first that has room."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        return [[by_name[name]] for name in self._affinity.ranked(_prompt(pending_request), loads)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray when a request is on its way."""
        self._affinity.note(_prompt(pending_request), replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray when replicas come and go."""
        gone = {replica_id.unique_id for replica_id in self.curr_replicas}
        super().update_replicas(replicas)
        for name in gone - {replica_id.unique_id for replica_id in self.curr_replicas}:
            self._affinity.forget(name)


def offers_of(models: Models, options: Mapping[str, Any]) -> list[Offer]:
    """What a replica offers; the engines are made on first use."""
    if callable(models):
        return [Offer("model", models)]
    named = [(None, models)] if isinstance(models, str) else list(models.items())
    return [offer(source, name, dict(options), InferenceEngine.from_pretrained) for name, source in named]


def _prompt(request: PendingRequest | None) -> str:
    return request.args[0] if request is not None and request.args and isinstance(request.args[0], str) else ""
