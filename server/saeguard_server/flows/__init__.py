"""What each RPC does, in domain words."""
