"""A pytest plugin for `omnimix mixers check`: the tests that concern one mixer, and a line for each file of them."""

from __future__ import annotations

import time
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mixer", help="run only the tests that have this mixer among their parameters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests with a parameter that is the mixer's name, or an object whose `mixer` it is."""
    name = config.getoption("--mixer")

    def concerns(item: Any) -> bool:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return any(value == name or getattr(value, "mixer", None) == name for value in given)

    items[:] = [item for item in items if concerns(item)]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress(), "omnimix-progress")


class Progress:
    """A line for each file of tests, and the text of each failure."""

    def __init__(self) -> None:
        self.file, self.passed, self.failed, self.start = "", 0, 0, 0.0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = nodeid.split("::")[0]
        if file != self.file:
            self.say()
            self.file, self.passed, self.failed, self.start = file, 0, 0, time.perf_counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failed += 1
            print(f"  {report.nodeid}\n{report.longreprtext}", flush=True)

    def pytest_sessionfinish(self) -> None:
        self.say()

    def say(self) -> None:
        if self.file:
            failed = f", {self.failed} failed" if self.failed else ""
            seconds = time.perf_counter() - self.start
            print(f"  {self.file:<40} {self.passed:4} passed{failed}, {seconds:.1f} s", flush=True)
