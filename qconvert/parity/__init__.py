"""What a conversion cost: metrics, causes, verdicts, reports."""
