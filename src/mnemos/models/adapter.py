"""The door through which foreign PyTorch modules come in; PyTorch itself is imported only when one does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mnemos.errors import MissingDependencyError

if TYPE_CHECKING:
    from mnemos.models.foreign.adapter import ForeignModel


def adapt(module: Any, **options: Any) -> ForeignModel:
    """A `Model` around an nn.Module; options as of mnemos.models.foreign.adapter.adapt."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("running an nn.Module needs PyTorch: pip install 'mnemos[torch]'") from error
    from mnemos.models.foreign.adapter import adapt as adapt_module

    # OpenMP keeps worker threads for every thread that ever used it, and where there are more of them than cores, each
    # operator waits for its workers to wake. What is tried here is tried in a thread that ends.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(adapt_module, module, **options).result()
