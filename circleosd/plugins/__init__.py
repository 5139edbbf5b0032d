"""plugin-manager: loads plugins into a store and has worker processes run them. No plugin code runs in the manager."""
