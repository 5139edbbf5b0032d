"""Tests that measure the machine: tests/conftest.py lets nothing else run meanwhile."""
