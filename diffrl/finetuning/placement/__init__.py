"""Where rewards stand along a chain, and what they are asked about: one file for each way."""
