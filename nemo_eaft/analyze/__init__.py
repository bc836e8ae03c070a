"""``nemo-eaft analyze``: what EAFT would do to a model on some data, found by forward passes alone."""
