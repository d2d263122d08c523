"""What is said to people: findings, causes, warnings, estimates, the page and the command line."""
