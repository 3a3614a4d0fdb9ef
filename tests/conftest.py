"""What every test may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from detkit import config

# No deadline: a busy machine is not a failure. CI tries the same examples each time.
settings.register_profile("detkit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("detkit")


# In CI, which has the groceries but no GPU and not the extras mlflow and wandb, a test that is skipped for any other
# reason has failed.
EXPECTED_SKIPS = ("needs a GPU", "needs mlflow", "needs wandb")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a module, which share fixtures, go to one process; but those of the shipped configs, which share
    none and take minutes together, one by one, so that no process is left alone with them at the end."""
    from xdist.scheduler import LoadScopeScheduling

    class Modules(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return nodeid if module.endswith("test_shipped.py") else module

    return Modules(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and "CI" in os.environ and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in EXPECTED_SKIPS:
            report.outcome, report.longrepr = "failed", f"skipped in CI: {reason}"
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in each test, whichever ran before; without importing torch where it isn't used."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def tiny_config(tmp_path: Path) -> config.Config:
    """A run with the smallest detector there is, on 64-pixel photos."""
    overrides = ("input.size=[64, 64]", "model.neck={name: pan, channels: 8}", "model.weights=none", "train.device=cpu")
    where = (f"data.root={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}", "name=tiny")
    return config.load("ssd_mobilenet", (*overrides, *where))
