"""The main job: score, decide, refit, cut, prove, report."""
