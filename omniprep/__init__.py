"""OmniPrep: raw conversations with media in, verified training shards out."""

__version__ = "0.1.0"
