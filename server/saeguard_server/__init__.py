"""The server: a language model with SAEs behind gRPC."""
