"""What fastrnn knows of Triton's and torch's insides: one file a subject, with the versions that it was read in."""
