"""The hosts a library can run on. `host.py` is the protocol; `abstract` is the one that is explored."""
