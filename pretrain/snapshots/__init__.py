"""The training state in host RAM: which host keeps which bytes, parity, and which step a start resumes from.

Knows arrays and peers on sockets; must not know models, data or the loop.
"""
