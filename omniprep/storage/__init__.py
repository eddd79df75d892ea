"""Where datasets lie: folders whose files are absent or complete, local or at any fsspec URL."""
