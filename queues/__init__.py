"""The trajectory queue: one pure state machine, and the process around it."""
