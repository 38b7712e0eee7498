"""Scripts around the simulator: policies compared, its speed, and how far it is from the real server."""
