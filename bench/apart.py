"""Tasks in a process of their own: one that ends or hangs takes no other with it."""

import multiprocessing
import os
import time

CONTEXT = multiprocessing.get_context("spawn")
# Seen by the parent as the place of the task that does not return.
POLL_SECONDS = 0.1


def run_apart(work, tasks, limit, said, failed):
    """``work(tasks, start)`` in a new process, where ``start(i)`` tells what begins.

    Where the process ends, or stays at one task for more than ``limit`` seconds,
    ``failed(task, reason)`` hears of it and the tasks behind go to a new one. What
    it writes to the standard error is added to the file ``said``.
    """
    while tasks:
        place = CONTEXT.Value("i", -1)
        process = CONTEXT.Process(
            target=_run, args=(work, tasks, said, place), daemon=True
        )
        process.start()
        try:
            late = not _returns(process, place, limit)
        finally:
            process.kill()
            process.join()
        if not late and process.exitcode == 0:
            return
        reason = f"no end after {limit:g} s" if late else _reason(process.exitcode)
        # What ends before the first task would do so again.
        reached = place.value if place.value >= 0 else len(tasks) - 1
        for task in tasks[max(place.value, 0) : reached + 1]:
            failed(task, reason)
        tasks = tasks[reached + 1 :]


def _run(work, tasks, said, place):
    def start(i):
        place.value = i

    with open(said, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    work(tasks, start)


def _returns(process, place, limit):
    seen, since = place.value, time.monotonic()
    while process.is_alive():
        process.join(POLL_SECONDS)
        if place.value != seen:
            seen, since = place.value, time.monotonic()
        elif process.is_alive() and time.monotonic() - since > limit:
            return False
    return True


def _reason(code):
    return f"the process ended by signal {-code}" if code < 0 else f"exit status {code}"
