"""The scorer contract, and the pass over a model's layers that runs scorers."""
