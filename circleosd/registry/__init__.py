"""service-registry: a catalog of names, and the actions on the systemd units behind them."""
