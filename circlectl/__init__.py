"""circlectl: the admin tool of CircleOSD. Fire builds its command line from the contracts that the services serve."""
