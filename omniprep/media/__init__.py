"""Media files to arrays: probe and decode."""
