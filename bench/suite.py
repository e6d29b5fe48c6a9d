"""Makes entries ready, checks them, times them and keeps the records."""

import gc
import sys
from dataclasses import asdict, replace
from functools import partial

import cases
import machine
import processes
import rivals
import timing
from oracle import WrongAnswer, check_prepared, make_inputs
from report import print_group
from rivals.prepared import Absent
from tqdm import tqdm

SAMPLE_Q_LEN = 8


class Suite:
    """Runs groups and keeps the records."""

    def __init__(self, arguments, write):
        self.arguments = arguments
        self.write = write
        self.records = []
        fast = timing.QUICK_ROUNDS if arguments.quick else timing.FAST_ROUNDS
        self.fast_rounds = arguments.rounds or fast
        self.origin = {
            "device": machine.device_name(),
            "versions": machine.versions(),
            "commit": machine.commit(),
            "threads": arguments.threads,
            "cold": not arguments.warm,
        }

    def record(self, kind, group, entry, **fields):
        made = {"kind": kind, **self.origin, "group": group.name, **asdict(entry)}
        made.update(fields)
        self.records.append(made)
        self.write(made)

    def prepare(self, entry, inputs):
        arguments = self.arguments
        return rivals.prepare(entry, inputs, arguments.threads, not arguments.warm)

    def expected_seconds(self, entry):
        """A prefill call's time, by rows, from a call with few rows."""
        shape = entry.shape
        if shape.q_len <= SAMPLE_Q_LEN:
            return 0.0
        small = replace(entry, shape=replace(shape, q_len=SAMPLE_Q_LEN))
        prepared = self.prepare(small, make_inputs(small.shape))
        return timing.seconds_of(prepared.run) * shape.q_len / SAMPLE_Q_LEN

    def ready(self, entry):
        """A runner for an entry whose answer is right; its facts for the record."""
        shape = entry.shape
        expected = self.expected_seconds(entry)
        if expected > self.arguments.max_call_seconds:
            raise Absent(
                f"too slow: about {expected:.0f} s a call, by {SAMPLE_Q_LEN} rows"
            )
        prepared = self.prepare(entry, make_inputs(shape))
        error = None
        if prepared.values is not None:
            error = check_prepared(prepared, shape)
        call_seconds = timing.seconds_of(prepared.run)
        calls = 1 if entry.one_call else timing.calls_for(call_seconds)
        rounds = timing.rounds_for(call_seconds, self.fast_rounds)
        runner = timing.Runner(str(entry), prepared.run, calls, rounds)
        facts = {
            "nmse": error,
            "kv_bytes": prepared.kv_bytes,
            "flops": prepared.flops or shape.flops,
            "note": prepared.note,
        }
        return runner, facts

    def ready_all(self, group, progress):
        ready = []
        for entry in group.entries:
            progress.set_postfix_str(f"checking {entry}")
            try:
                ready.append((entry, *self.ready(entry)))
            except Exception as error:  # one rival's fault must not stop the others
                self.leave_out(group, entry, error)
        return ready

    def leave_out(self, group, entry, error):
        known = isinstance(error, (Absent, WrongAnswer))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        wrong = isinstance(error, WrongAnswer)
        self.record("left_out", group, entry, reason=reason, wrong=wrong)

    def run(self, group):
        with tqdm(desc=group.name, unit=" samples", file=sys.stderr) as progress:
            ready = self.ready_all(group, progress)
            progress.reset(total=sum(runner.rounds for _, runner, _ in ready))

            def on_sample(runner):
                progress.set_postfix_str(runner.name)
                progress.update()

            timing.run_in_turns([runner for _, runner, _ in ready], on_sample=on_sample)
        for entry, runner, facts in ready:
            fields = {"rounds": len(runner.seconds), "calls": runner.calls, **facts}
            self.record(
                "time", group, entry, **timing.summary(runner.seconds), **fields
            )
        del ready
        gc.collect()

    def run_processes(self, group, kind, measure):
        """The groups that need a process for each entry."""
        for entry in tqdm(group.entries, desc=group.name, file=sys.stderr):
            try:
                self.record(kind, group, entry, **measure(entry))
            except RuntimeError as error:
                self.leave_out(group, entry, error)


def all_groups(quick):
    every = cases.groups(quick)
    return every + [processes.thread_group(quick), processes.memory_group(quick)]


def run_groups(suite, chosen):
    arguments = suite.arguments
    for group in chosen:
        if group.name == "memory":
            measure = partial(processes.measure_memory, threads=arguments.threads)
            suite.run_processes(group, "memory", measure)
        elif group.name == "threads":
            measure = partial(processes.measure_threads, rounds=suite.fast_rounds)
            suite.run_processes(group, "threads", measure)
        else:
            suite.run(group)
        print_group([r for r in suite.records if r["group"] == group.name])
