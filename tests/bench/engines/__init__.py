"""Our engines as workers."""
