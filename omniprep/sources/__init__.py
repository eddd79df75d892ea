"""Where records come from: containers, formats, and the media that records name."""
