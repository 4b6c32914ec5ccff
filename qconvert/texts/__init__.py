"""From what people give as text to token windows, by the tokenizer and chat template of a checkpoint."""
