"""The only place that imports D-Bus, journal and sd_notify libraries."""
