"""Training an SAE: ours beside the libraries' own trainers, on the same activations."""
