"""What rounding costs on held-out text, by method and tool: candidates, their scores, and the table of them."""
