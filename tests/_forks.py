"""Processes for tests that start at once: forks of one that has imported what they need.

A new interpreter takes seconds to import PyTorch, and some tests start many. The forks are made by
a server that computes nothing, so that no thread is lost; it starts with the first process, once
for each process that runs tests, and ends with it.
"""

import functools
import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

IMPORTED = (
    "torch._dynamo",  # optimizers import it when they are first used
    "tests.distributed.harness",
    "examples.pathology.features.dispatch",
    "examples.pathology.study.benchmark",
    "tests._frozen",  # the last
)


@functools.cache
def forking() -> BaseContext:
    """Return what starts processes: by forks, where the platform has them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    forkserver.ensure_running()  # whoever names other modules comes too late
    return context
