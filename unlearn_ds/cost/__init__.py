"""What a run costs, worked out without running it. Arithmetic only."""
