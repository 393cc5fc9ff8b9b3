"""What is set before the libraries are imported, and the fixtures where tests run."""

import gc
import importlib
import os

import pytest

gc.disable()  # until all is imported: looking for garbage among the libraries takes a quarter of that time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, except in the process that hands the tests to others: it runs none and needs no library."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(importlib.import_module("shared_fixtures"))
