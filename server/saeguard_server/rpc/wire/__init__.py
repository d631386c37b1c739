"""Messages to domain objects and back. Requests in: total, and every refusal names the field. Replies out: plain."""
