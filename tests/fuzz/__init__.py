"""Fuzzing of every parser in Python: mutated inputs by the million, each answered by a result or by an exception of csvfast.

    campaign.py   runs one target for any number of inputs:  python -m fuzz.campaign certificate --inputs 10000000
    targets.py    what is fuzzed, with seeds to start from
    mutate.py     how an input is changed

The C parsers have libFuzzer targets of their own in csrc/fuzz.
"""
