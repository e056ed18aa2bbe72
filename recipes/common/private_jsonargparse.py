"""What the recipes use of jsonargparse and argparse that these keep private; no other file does.

`tests/recipes/test_private.py` says when a release of jsonargparse changes one of them.
"""

from __future__ import annotations

import argparse

from jsonargparse import ArgumentParser


def actions(parser: ArgumentParser) -> list[argparse.Action]:
    """The options of a parser and of its subcommands."""
    subcommands = parser._subcommands_action
    parsers = [parser, *(subcommands.choices.values() if subcommands else ())]
    return [action for one in parsers for action in one._actions]
