"""Reading and writing checkpoints, and students as files of their own."""
