"""Our operators by themselves: how loops go over rows, what they add up, which random numbers they draw."""
