"""The paper in miniature: what to run (plan), one piece (work), all of them (pool), the report."""
