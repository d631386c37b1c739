"""The only place in the client that knows protobuf: requests become bytes, bytes become results."""
