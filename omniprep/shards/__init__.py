"""Datasets on disk: shards, their index, the manifest and the quarantine."""
