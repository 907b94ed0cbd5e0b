"""Sandboxes and containers: state machines, records, logs, events."""
