"""A training run from a configuration: ``saeguard train``, and ``run.train_from_config`` from Python."""
