"""The command line: what is typed, what is printed, exit codes, and what is imported for it."""
