"""Stage 2: train a policy from cached reference scores.

The package itself can be called: `offline_kto.train(...)` is `offline_kto.api.train`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from offline_kto import api

        return api.train(*args, **options)


sys.modules[__name__].__class__ = _Callable
