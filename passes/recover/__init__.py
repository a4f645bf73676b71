"""Passes that win back what compression lost, by training a little on data without labels."""
