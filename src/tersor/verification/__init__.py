"""Proof that a written file means what was meant: it is opened again by a reader that is not ours, and compared."""
