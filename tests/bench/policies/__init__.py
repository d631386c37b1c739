"""What policies go through: killed writers, a stopped database, a thousand changes in front of four servers."""
