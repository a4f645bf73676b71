"""Matchers of raise-idioms. Each rule takes a program and the last node of its pattern, and returns the replacement or None."""
