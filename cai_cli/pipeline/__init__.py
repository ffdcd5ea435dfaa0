"""`cai run`: run files, sweeps, the plan, its cost and its execution."""
