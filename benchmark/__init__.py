"""What is measured. Each script prints one line a figure, takes `--json FILE`, and exits 1 when a goal is missed."""
