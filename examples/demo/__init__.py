"""`make demo`: from image to answer in one command, on a machine without a GPU."""
