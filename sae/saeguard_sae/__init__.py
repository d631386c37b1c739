"""What a sparse autoencoder is: torch only, no server and no wire."""

from saeguard_sae.settings import let_waiting_threads_go

let_waiting_threads_go()
