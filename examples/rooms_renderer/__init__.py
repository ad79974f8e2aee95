"""The parts of examples/render_rooms.py, one idea a file; README.md says how they hang together."""
