"""What is wrong with this box, and how to mend it: the checks behind `reconciler doctor`.

A read-only face like `metrics`: each module looks at one kind of thing and says what it found. Nothing here repairs,
starts or stops anything, and nothing that the loop decides rests on it.
"""
