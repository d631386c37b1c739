"""What a sparse autoencoder is: torch only, no server and no wire."""
