"""What a developer or a user runs; not part of the wheel."""
