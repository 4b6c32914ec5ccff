"""The architecture as data: names and roles, shapes, families."""
