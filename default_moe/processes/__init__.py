"""How processes start, agree and stop."""
