"""A generic map over partitions: in this process, or on Ray."""
