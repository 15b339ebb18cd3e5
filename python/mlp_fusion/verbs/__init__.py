"""What the package does, one verb a file."""
