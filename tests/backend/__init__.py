"""What stands around the passes: stages and their runner, options, listeners, caches, what is left in a process."""
