"""Deadlines for collectives, and the report of where every rank is when one passes or a rank fails."""
