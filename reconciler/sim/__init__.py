"""A simulated node behind the same ports: a driver object under the real pynvml, engines that are real processes.

Belongs here: the node's description and folder, the ledger of who holds how much memory, the driver below pynvml, the
simulated engines, foreign tenants and faults. Never here: a rule of the planner, or a short cut for it. What is
simulated must be as hard to live with as the real thing; the facts stand in docs and in each module's docstring.
"""
