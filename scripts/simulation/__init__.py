"""The queue's own core against simulated engines, actor and learner under a virtual clock."""
