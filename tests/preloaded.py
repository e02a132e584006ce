"""Processes that have imported hivewright already: forks of one that did nothing else.

An import takes a second for a service and five for a worker, so tests that start many of them,
or kill one and start the next, start them here. Everything else of a new process is the same.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


def start(module: str, target: Callable[..., Any], *arguments: object) -> BaseProcess:
    """Start a process that calls `target`; `module` is what takes long to import.

    The first module that is named in this process of the tests is imported once; later ones by
    each process, as far as the first did not.
    """
    _CONTEXT.set_forkserver_preload([module])
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process
