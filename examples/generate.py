"""Continues a text with a training checkpoint: python examples/generate.py CHECKPOINT TOKENIZER [PROMPT]"""

from __future__ import annotations

import sys

from mnemos import Generator


def main(checkpoint: str, tokenizer: str, prompt: str = "Hello world") -> None:
    """Prints the prompt and what continues it."""
    print(f"Loading Tokenizer from {tokenizer}...")
    print(f"Loading Checkpoint from {checkpoint}...")
    generator = Generator(checkpoint, tokenizer)
    print("Generator Ready.\n")
    print(f"Prompt: {prompt}")
    print("-" * 30)
    print(generator.generate(prompt, max_new_tokens=50, temperature=0.8, top_p=0.95))
    print("-" * 30)


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
