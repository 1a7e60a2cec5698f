"""The Prometheus page: what the loop sees and decides, as metrics."""
