"""Weights of others, one file each: the file's name is the layout's name on the command line (`--from guided`).

A file `train/converters/<name>.py` defines `settings(weights, said)`, the flags of those weights and of what the JSON
beside them says, and `converted(weights, config, new_attention_order)`, the tensors of our UNet by name, each with the
name it had.
"""
