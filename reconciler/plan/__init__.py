"""The planner: pure functions from (Spec, Observed, Ledger, now) to Plan.

Belongs here: the planner's input and output types and every rule of who runs where. Never here: I/O, a clock, a log,
randomness, or anything that depends on the order of a dict or a file.
"""
