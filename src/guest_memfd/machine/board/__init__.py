"""A machine put together: its parts as data, the CPUs that execute, the ghosts that the laws read."""
