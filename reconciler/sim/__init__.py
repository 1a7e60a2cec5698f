"""A simulated node behind the same ports: a driver object under the real pynvml, and engines that are real processes."""
