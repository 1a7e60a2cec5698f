"""A simulated node behind the same ports: a driver object under the real pynvml, engines that are real processes."""
