"""Records with their media to encoded samples."""
