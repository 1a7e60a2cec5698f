"""The daemon: what wakes it, and the walk over the ready frontier of a plan. No rules of who runs where."""
