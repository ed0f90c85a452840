"What the tests share that run jobs in forks of a process which has imported everything."

import gc
import importlib
import os
import resource
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing import get_context


def in_fork(work):
    "Do something in a process of its own, which may start threads; returns what it gives."
    ours, theirs = (context := get_context("fork")).Pipe(False)
    (child := context.Process(target=lambda: theirs.send(work()))).start()
    result = ours.recv()
    child.join()
    return result


def fork_logged(log, program):
    "Run a program in a fork whose output is added to a file; returns its process id."
    log.write_text("")
    if pid := os.fork():
        return pid
    status = 1
    try:
        opened = os.open(log, os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(opened, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # not pytest's
        program()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for out in (sys.stdout, sys.stderr):
            out.flush()
        os._exit(status)


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
