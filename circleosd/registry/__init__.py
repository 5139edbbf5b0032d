"""service-registry: a catalog of names, and what may be done to the systemd units behind them."""
