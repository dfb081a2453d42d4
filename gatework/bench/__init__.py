"""Tasks, studies, the runner, the store, statistics and the report."""
