"""Corpus, tokenizer and token windows; the training entry of the demo checkpoint."""
