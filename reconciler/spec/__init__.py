"""The set-point language: what should run, as files written by people, and the value they resolve to.

Belongs here: pydantic models of both file formats, YAML with positions, defaults and names resolved into a `Spec`,
engine profiles, JSON Schemas. Never here: anything that looks at the box, knows the time, or decides.
"""
