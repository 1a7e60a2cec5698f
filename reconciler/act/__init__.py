"""Changing the outside world, one idempotent `ensure_*` at a time. Ownership is proven before every signal."""
