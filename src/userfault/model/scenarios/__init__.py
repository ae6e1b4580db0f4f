"""Scenarios that come with the explorer.

history    the kernel's own defects, each with its mended twin
handlers   mistakes of fault handlers, each with the mended handler beside it
engine     the protocol of this project's engine, with rules that can be got wrong
"""
