"""What runs on a board: packed into one file, copied there and started over SSH; see `nas.devices.agent`.

Everything in this package keeps to the syntax and the standard library of Python 3.6 (JetPack 4.6 on a Jetson Nano) and
imports nothing but its own modules, relatively. numpy and runtimes are imported inside the functions that need them.
The program on the host imports the same modules in its own process.
"""
