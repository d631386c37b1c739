"""What operators see: metrics and logs, each declared once."""
