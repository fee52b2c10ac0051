"""kdump for POWER: place, load, hand over to and prove the capture kernel."""

__version__ = "0.1.0"
