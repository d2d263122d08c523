"""The proof: which functions of the rows of a graph are row-wise, and what makes one refused."""
