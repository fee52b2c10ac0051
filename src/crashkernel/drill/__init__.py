"""The drill: a virtual twin of the machine is crashed, and its dump held against what its memory was."""
