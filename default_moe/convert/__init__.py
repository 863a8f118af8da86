"""Models of others as runs, and runs as models that others load: Hugging Face's folders."""
