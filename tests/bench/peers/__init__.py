"""Other people's engines as workers. Each module runs in an environment that has the library, ours it need not have."""
