"""One file an operator, to be read first: formula, shapes, checks, reference, gradient and registration."""
