"""A Jetson that is not there: fake trtexec, nvpmodel, jetson_clocks and tegrastats, and the files a board shows.

Everything is written into a folder of the test. Every time, power and temperature here is simulated: no figure comes
from a board. Use `fake_board.tools` to install the programs and `fake_board.tree` to write the files.
"""
