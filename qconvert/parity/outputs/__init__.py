"""A report as files: JSON for programs, a page and Markdown for people, JUnit XML for CI, numbers for a model card."""
