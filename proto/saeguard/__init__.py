"""The wire contract of Saeguard: protobuf files and the stubs generated from them."""
