"""Scoring: the scorer contract (`scorer.Scorer`), and the layer-by-layer pass that runs scorers (`walk.walk`)."""
