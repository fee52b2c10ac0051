"""What people look at: memory maps and reports."""
