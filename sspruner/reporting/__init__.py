"""Draw records as tables, figures, HTML and model cards."""
