"""Importing the function behind a command."""

import gc
import os
import sys

from worker.runtime import entry_point


def test_import_of_a_command_leaves_the_recursion_limit(monkeypatch):
    before = sys.getrecursionlimit()

    def imports(_):
        sys.setrecursionlimit(10 * before)
        return os

    monkeypatch.setattr(entry_point.importlib, "import_module", imports)
    assert entry_point.load("os:getpid") is os.getpid
    assert sys.getrecursionlimit() == before


def test_collector_looks_through_no_import(monkeypatch):
    made = []

    def imports(_):
        assert not gc.isenabled()
        made.append([])
        return os

    monkeypatch.setattr(entry_point.importlib, "import_module", imports)
    assert entry_point.load("os:getpid") is os.getpid
    assert gc.isenabled()
    assert not any(each is made[0] for each in gc.get_objects())
