"""The pure part of Canopy: messages, host sets, topology, the relay's state machine, transfer and signatures.

Nothing here opens a socket, reads a clock, starts a thread or draws a random number: time, keys and randomness are
passed in, so that the same input gives the same output in a test with a thousand hosts as on a real fleet.
"""
