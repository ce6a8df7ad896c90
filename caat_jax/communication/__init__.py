"""What a program sends: read from the compiled program, and counted in the traced one.

`training` and `inference`, whose programs it reads, come before it.
"""
