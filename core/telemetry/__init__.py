"""Metrics and logs, as listeners of events."""
