"""A pytest plugin for `test_law_8.py`: every n-th test only, so that processes share a file's tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", required=True, help='"i/n": run the tests i, i + n, i + 2n, ...')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, total = map(int, config.getoption("--shard").split("/"))
    items[:] = items[index::total]
