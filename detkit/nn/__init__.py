"""Detection models: backbones, necks, heads, on one contract (see contract.py)."""
