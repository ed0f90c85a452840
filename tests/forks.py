"What the tests share that run jobs in forks of a process which has imported everything."

import gc
import importlib
import resource
import time
from contextlib import suppress
from multiprocessing import get_context


def in_fork(work):
    "Do something in a process of its own, which may start threads; returns what it gives."
    ours, theirs = (context := get_context("fork")).Pipe(False)
    (child := context.Process(target=lambda: theirs.send(work()))).start()
    result = ours.recv()
    child.join()
    return result


def import_all(names):
    "Import what a run has imported, so that later runs begin with it; the collector leaves it alone."
    for name in names:
        with suppress(Exception):
            importlib.import_module(name)
    gc.freeze()


def time_used(began):
    "Since a moment of the monotonic clock, children included."
    used = [resource.getrusage(o) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return f"{time.monotonic() - began:.0f} s, {sum(o.ru_utime + o.ru_stime for o in used):.0f} s of CPU"
