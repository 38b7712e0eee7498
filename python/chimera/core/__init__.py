"""The nouns of the system, frozen, with their arithmetic. Knows no process, no file, no clock and no device.

Simulator and live server speak of the very same objects; nothing here differs between the two.
"""
