"""What is measured, by topic."""
