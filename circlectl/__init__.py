"""circlectl: the admin tool of CircleOSD, its command line made by Fire from the contracts that the services serve."""
