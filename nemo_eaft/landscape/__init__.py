"""The entropy-probability landscape of arXiv 2601.02151: how sure the model is, against what it gives the label."""
