"""One training step: pure, knows no text and no disk."""
