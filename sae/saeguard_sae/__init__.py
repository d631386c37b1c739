"""What a sparse autoencoder is: torch only, no server and no wire."""

from saeguard_sae.settings import limit_openmp_spinning

limit_openmp_spinning()
