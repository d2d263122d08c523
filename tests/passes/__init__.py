"""Rewrites of graphs: what fires, what is refused and with which cause, and eager's numbers in each spelling."""
