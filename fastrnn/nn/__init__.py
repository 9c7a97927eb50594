"""The modules and functions that a user calls, with torch.nn's arguments, and the layers that they stack."""
