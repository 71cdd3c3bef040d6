"""What each update is made of: one file for each plan."""
