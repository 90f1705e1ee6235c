"""Long-lived loops; the only place where engines, queues and algorithms meet."""
