"""Weights in and out: anyone's weights as a `View`, and a view in the formats that other libraries load."""
