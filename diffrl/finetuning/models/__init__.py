"""What can be tuned: one file each."""
