"""What the pages of `moezoo.models` are made of; nothing here knows an architecture's page."""
