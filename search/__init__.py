"""Search: what each layer's choices lose (`sensitivity`), what they cost (`cost`), and which to take (`solvers`, `planner`)."""
