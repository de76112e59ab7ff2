"""Reporting: records as tables, figures, HTML pages and model cards."""
