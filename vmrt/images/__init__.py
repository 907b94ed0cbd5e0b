"""Registry and archive to content-addressed, read-only block images."""
