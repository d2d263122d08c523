"""Meters of memory, and processes to measure in: ``cpu`` (two meters), ``gpu`` (CUDA's own records), ``apart``."""
