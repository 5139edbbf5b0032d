"""plugin-manager: loads plugins into a store and has worker processes run them. The manager never runs plugin code."""
