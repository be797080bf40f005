"""What every other package may use: files, errors, id maps, processes."""
