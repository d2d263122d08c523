"""What one graph says: spellings of operations, arguments by name."""
