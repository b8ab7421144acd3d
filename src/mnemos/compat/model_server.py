"""A small server object, and its REST API, by the names of the NOVA documents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mnemos.engine.engine import InferenceEngine
from mnemos.engine.prompts import listed

if TYPE_CHECKING:
    from mnemos.engine.completion import Completion
    from mnemos.serve.guard import Guard


class ModelServer:
    """Generates text with a model, for callers that have texts and want texts.

    model: a module, a `Model`, an engine, or what `InferenceEngine.from_pretrained` takes. tokenizer: as there; None
    for a model that brings its own. device: where a module runs. options: further ones of the engine.
    """

    def __init__(self, model: Any, tokenizer: Any = None, device: str = "cpu", **options: Any) -> None:
        if isinstance(model, InferenceEngine):
            self.engine = model
        elif isinstance(model, (str, os.PathLike)):
            if tokenizer is not None:
                options["tokenizer"] = tokenizer
            self.engine = InferenceEngine.from_pretrained(model, device=device, **options)
        else:
            self.engine = InferenceEngine(model, tokenizer, device=device, **options)

    def predict(self, text: str, max_length: int = 50, temperature: float = 0.8, **fields: Any) -> str:
        """The continuation of a text.

        max_length: the most tokens of prompt and continuation together. fields: others of GenerationConfig.
        """
        completion: Completion = self.engine.complete(text, max_length=max_length, temperature=temperature, **fields)
        return completion.text

    def batch_predict(
        self, texts: Sequence[str], max_length: int = 50, temperature: float = 0.8, **fields: Any
    ) -> list[str]:
        """`predict` for several texts at once."""
        fields |= {"max_length": max_length, "temperature": temperature}
        return [completion.text for completion in self.engine.complete(listed(texts), **fields)]


class InferenceAPI:
    """Serves a `ModelServer` over HTTP: `POST /generate`, `GET /health`, the API's description at `/docs`, and more.

    server: what answers. host, port: where it listens. settings: further ones of `mnemos.serve.settings.Settings`.
    """

    def __init__(self, server: ModelServer, host: str = "127.0.0.1", port: int = 8000, **settings: Any) -> None:
        from mnemos.serve.settings import Settings

        self.server = server
        self.settings = Settings(host=host, port=port, **settings)

    @property
    def app(self) -> Guard:
        """The ASGI application, for a server of your own."""
        from mnemos.serve import app

        application: Guard = app(self.server.engine, settings=self.settings)
        return application

    def run(self) -> None:
        """Answers until Ctrl-C."""
        import sys

        application = self.app
        from mnemos.serve.run import address, listen, serve, warning

        listener = listen(self.settings)
        loud = warning(self.settings, has_keys=False)
        if loud:
            print(f"mnemos: warning: {loud}", file=sys.stderr)
        serve(
            application,
            listener,
            lambda: print(f"mnemos: ready at {address(listener, self.settings)}  (Ctrl-C stops)", file=sys.stderr),
        )
