"""Optimizers whose states are parked on the host."""
