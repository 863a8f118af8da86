"""How experts are computed: `sparse.py` is the way in."""
