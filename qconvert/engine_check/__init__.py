"""The engines' loading rules, applied to a written checkpoint from its headers and ``config.json`` alone."""
