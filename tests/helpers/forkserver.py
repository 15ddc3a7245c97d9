"""The server that the processes of all tests are forked from: it imports torch and DeepSpeed once for each pytest worker."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOADED = [
    "hpc_c2g.training.loop",
    "deepspeed",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it with ZeRO, and torch's compiler with it
    "pytest",
    "hypothesis",
]


def forkserver() -> ForkServerContext:
    """The context to start processes with; a process has one server, so its modules are the same for every test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
