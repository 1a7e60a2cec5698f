"""Faces for people at a terminal: parse arguments, call, render. `wiring` puts the real parts together.

Belongs here: arguments, exit codes, tables, progress, colour. Never here: a decision about the box, a rule of the
language, a signal. stdout is data, stderr is logs and progress.

Each command lives in a module that is imported only when the command is asked for (`main`).
"""
