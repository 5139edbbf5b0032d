"""CircleOSD: limited, accountable control over a Linux host, without handing out sudo."""

__version__ = "0.1.0"
