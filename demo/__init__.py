"""The demonstration: one pod with two containers, end to end, on a private root."""
