"""Models: one declaration an architecture, and the registry that finds it."""
