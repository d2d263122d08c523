"""The memory plan: the layers of a joint graph, what they may keep, the solver, and steps that were planned."""
