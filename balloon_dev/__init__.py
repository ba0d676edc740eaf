"""The balloon device type: features, config space, command ids, the hint table, the device model and the oracle."""
