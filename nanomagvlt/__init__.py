"""MAGVLT: one bidirectional transformer that draws a prompt and captions an image. Start with masking.py."""
