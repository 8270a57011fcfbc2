"""``python -m avlm`` is the command ``avlm``."""

from avlm.cli import main

main()
