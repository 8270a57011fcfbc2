"""What the walk-through takes where it is given nothing: a tiny LLaVA-1.5 of random weights, and drawn pictures.

Nothing is downloaded. The checkpoint is written by transformers' own classes, so it has the names, the processor and
the chat template of the real one; only its widths are small and its answers are noise.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 90, 230), "yellow": (238, 208, 30)}
SHAPES = ("square", "circle")
SIDE, PATCH = 28, 14
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""How checkpoints of LLaVA-1.5 write a conversation."""


def checkpoint(out: Path) -> Path:
    """A LLaVA-1.5 in transformers' format, made once."""
    if out.is_dir():
        return out
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters, show_progress=False)
    words.train_from_iterator([], trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>"
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(**small, vocab_size=len(tokenizer) + 8, max_position_embeddings=2048),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        pictures, tokenizer, PATCH, "default", chat_template=TEMPLATE, num_additional_image_tokens=1
    )
    LlavaForConditionalGeneration(config).save_pretrained(out)
    processor.save_pretrained(out)
    return out


def pictures(out: Path, count: int = 24) -> Path:
    """A folder of drawn pictures, each with its caption in a text file of the same name."""
    out.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour, shape = list(COLOURS)[i % len(COLOURS)], SHAPES[i // len(COLOURS) % len(SHAPES)]
        picture = Image.new("RGB", (48, 36), (235, 235, 235))
        box = (6 + i % 12, 4 + i % 7, 28 + i % 12, 26 + i % 7)
        draw = ImageDraw.Draw(picture)
        (draw.rectangle if shape == "square" else draw.ellipse)(box, fill=COLOURS[colour])
        picture.save(out / f"{i:03}.png")
        (out / f"{i:03}.txt").write_text(f"a {colour} {shape}")
    return out
