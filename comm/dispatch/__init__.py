"""Token movement: one module per dispatcher, all behind one contract."""
