"""transformers' own commands for our directories: ``python -m avlm.inference.elsewhere.transformers_cli serve DIR``.

`transformers serve` finds a class and what it can do in a table of names, which registration with the `Auto*` classes
does not reach. Here our name is put into that table, in this process alone, and then theirs is the command.
"""

from __future__ import annotations


def main() -> None:
    """Run transformers' command line."""
    from transformers.models.auto import modeling_auto

    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["avlm"] = "AvlmForConditionalGeneration"
    from transformers.cli.transformers import main as theirs

    theirs()


if __name__ == "__main__":
    main()
