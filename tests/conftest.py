"""What all tests share: a way to run Python as a process of its own, and which of them go to one worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

# A shell may export it, and then text would be wrapped otherwise than the pages show it.
os.environ.pop("COLUMNS", None)

# What is started in the background by a shell, or by nohup, has these ignored, and hands that on to what it starts.
for _number, _handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python() -> Python:
    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        places = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
                              env={**os.environ, "PYTHONPATH": places, **env})

    return run


# How long the first use of the compiled engine took is no failure. (In pyproject.toml the class would be imported before
# pytest is ready to rewrite what the package asserts.)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::guest_memfd.errors.EngineNotice")


# The longest test begins first, or one worker waits for it at the end.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_of_a_sample" not in item.nodeid)


# Tests of one class share what takes seconds to make, so they go to one worker; all others go to whoever is free.
# (xdist's groups do not work with pytest 9.2: xdist 3.8 puts them into an attribute that is not there any more.)
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByClass(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("[")[0]
            return name.rpartition("::")[0] if name.count("::") > 1 else nodeid

    return ByClass(config, log)
