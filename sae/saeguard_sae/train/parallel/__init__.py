"""Several processes that train together: each has its own part of every batch, or of the features."""
