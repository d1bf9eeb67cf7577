"""Benchmarks of csvfast's primitives against every other implementation found on the machine, in one run.

machine.py says what the figures were measured on, cases.py and sm2.py what is measured, peers.py who it is compared with,
runner.py how the time is taken, chart.py draws. `csvfast bench` and the suites under bench/ stand on these.
"""

from __future__ import annotations

from csvfast.benchmark.cases import NAMES, Plan, make_cases
from csvfast.benchmark.machine import Machine, clock_hertz, machine_facts
from csvfast.benchmark.runner import Case, Result, rate_of, run_cases

__all__ = [
    "NAMES",
    "Case",
    "Machine",
    "Plan",
    "Result",
    "clock_hertz",
    "machine_facts",
    "make_cases",
    "rate_of",
    "run_cases",
]
