"""Codes for differences between weights: what changed by how many steps of the last place, in few bits.

ulp         the sparse form: positions and steps; it composes without the weights it belongs to
fast        about 12.5 bits per changed element, in blocks, decoded without the weights: for the local network
small       about 7 bits per changed element, decoded with the weights: for links between sites
payload     many tensors in one run of bytes, each in the code that suits it; what is sent
"""
