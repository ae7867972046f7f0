"""Types, keyed randomness, configuration and the process group: what every other floor stands on."""
