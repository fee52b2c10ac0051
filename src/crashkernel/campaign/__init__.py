"""Campaigns: hundreds of drills from one file, run on many CPUs, kept in one database, and compared."""
