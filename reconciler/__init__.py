"""Declarative set points for the GPUs of one box."""
