"""Data as it lies in other people's files, one kind of file each. `avlm.data.sources` is the door."""
