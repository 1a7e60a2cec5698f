"""Reading the outside world into one `Observed`. Synchronous, bounded in time, and never changing anything.

A failed observation is *unknown*; it is never reported as absence.
"""
