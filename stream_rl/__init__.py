"""The words and the wires: types, messages, transport, config, runtime, metrics, errors.

Everything above imports from here; nothing here imports from above.
"""
