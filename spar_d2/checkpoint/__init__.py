"""Reading and writing of checkpoints, and export of students."""
