"""The tools' own arithmetic, and that they run."""
