"""Measuring by the thousand: many files side by side in the lanes of a core, on all cores, on other machines.

    rows        what is measured (items) and what came of it (rows)
    tasks       the units of work that executors carry, and `perform`, which does one
    executors   the protocol, threads and processes
    ledger      rows on disk, safe against a kill at any moment

See docs/fleets.md.
"""
