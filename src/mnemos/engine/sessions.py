"""An engine's open sessions, by name."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, cast
from weakref import WeakValueDictionary

from mnemos.contract import ConditionedModel, Model, ModelSpec, PagedModel
from mnemos.engine.session import Host, Session
from mnemos.errors import FormatError, UnsupportedError
from mnemos.memory.session_file import SessionFile
from mnemos.memory.session_folder import forget_session, list_sessions, session_folder, session_path
from mnemos.memory.session_records import Binding, Summary

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.launching import Launcher
    from mnemos.engine.thread import EngineThread
    from mnemos.text.tokenizer import Tokenizer


class Sessions:
    """Opens sessions; one that is open already, and in use by somebody, is the same object for all.

    folder: see `session_folder`. defaults: the config of turns that have none. UnsupportedError for a model that reads
    its prompt with an encoder.
    """

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        launcher: Launcher,
        thread: EngineThread,
        folder: str | os.PathLike[str] | None,
        defaults: GenerationConfig | None,
    ) -> None:
        if isinstance(model, ConditionedModel):
            raise UnsupportedError(
                f"{spec.architecture} reads its prompt with an encoder, so that no text goes on; a session needs a "
                "model that continues its prompt"
            )
        tree = thread.core.scheduler.tables.tree
        cache = None if tree is None else cast(PagedModel, model).cache
        self._host = Host(tokenizer, spec, launcher, thread, defaults, tree, cache)
        self._binding = Binding.of(spec, cache)
        self._folder = folder
        self._lock = threading.Lock()
        self._open: WeakValueDictionary[tuple[str, str], Session] = WeakValueDictionary()

    def open(self, name: str, tenant: str = "") -> Session:
        """The session of this name; see `InferenceEngine.session`."""
        folder = session_folder(self._folder, tenant)
        path = session_path(folder, name)
        with self._lock:
            session = self._open.get((tenant, name))
            if session is None or session.closed:
                try:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                except OSError as error:
                    raise FormatError(
                        f"{folder}: the folder of sessions cannot be made: {error.strerror or error}; name another "
                        "one with session_dir"
                    ) from error
                session = Session(self._host, SessionFile(path, self._binding, name), partial(self.open, tenant=tenant))
                self._open[tenant, name] = session
        return session

    def list(self, tenant: str = "") -> list[Summary | FormatError]:
        """All sessions; see `InferenceEngine.sessions`."""
        return list_sessions(session_folder(self._folder, tenant))

    def forget(self, name: str, tenant: str = "") -> None:
        """Deletes a session; see `InferenceEngine.forget_session`."""
        folder = session_folder(self._folder, tenant)
        if session_path(folder, name).exists():
            try:
                self.open(name, tenant).forget()
                return
            except FormatError:  # it is damaged or of another model: there is nothing of it in the cache
                pass
        forget_session(folder, name)

    def close(self) -> None:
        """Closes all that are open."""
        with self._lock:
            for session in self._open.values():
                session.close()
