"""Stage 1: score feedback under a frozen reference model, once.

The package itself is callable: `offline_kto.precompute(...)` is `offline_kto.api.precompute`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from offline_kto import api

        return api.precompute(*args, **options)


sys.modules[__name__].__class__ = _Callable
