"""functools.lru_cache for functions that torch.compile meets. It ignores such caches anyway, but warns about them."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def cached(function: Callable) -> Any:
    """A decorator: keep the last 1024 results. While torch.compile traces, keep none.

    >>> from fastrnn.compat.cached import cached
    >>> calls = []
    >>> square = cached(lambda x: calls.append(x) or x * x)
    >>> square(3), square(3), calls
    (9, 9, [3])
    """
    kept = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args) if torch.compiler.is_compiling() else kept(*args)

    call.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return call
