"""What a user calls: modules and functions with torch.nn's arguments, and the layers that they stack."""
