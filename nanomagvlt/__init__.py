"""MAGVLT: one bidirectional transformer that draws a prompt and captions an image. Start with config.py."""
__version__ = "0.1.0"
