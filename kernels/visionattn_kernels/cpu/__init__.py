"""The CPU paths of the operators, in plain torch: one file an operator, beside what they share."""
