"""Calibration: token windows from text, layer-by-layer replay, the statistics that scorers read, and gradients.

Main names: `sources.calibration`, `replay.Replay`, `view.SSMView`.
"""
