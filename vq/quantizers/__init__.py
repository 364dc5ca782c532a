"""Quantizers, one file each: the file's name is the quantizer's name on the command line (`--quantizer fsq`)."""
