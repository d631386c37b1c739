"""What a safety team enforces on everybody's requests: policies, their revisions, and what they make of a request."""
