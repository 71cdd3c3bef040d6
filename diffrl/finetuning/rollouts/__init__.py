"""What is collected for one iteration: one file for each plan."""
