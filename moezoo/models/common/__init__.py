"""Parts that the pages of `moezoo.models` share. Nothing here imports a page."""
