"""What must survive: SQLite (events, ledger, incidents, texts in force) and the records of each incarnation.

Belongs here: file formats, durability, migration. Never here: rules, or anything that signals a process.
"""
