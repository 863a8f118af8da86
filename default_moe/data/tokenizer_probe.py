"""Tries the tokenizer.json on standard input: a program of its own, since a wrong one may hang, crash or fill memory.

Prints why the tokenizer cannot be used, or nothing. Imports nothing of the package, so that it starts at once.
"""

import contextlib
import resource
import sys

import tokenizers

MEMORY_BYTES = 8 << 30
TEXTS = (
    'Plain text, it\'s (short): 1234.5 "x"\r\n\n\tüber 世界 \U0001f600 e\u0301 \ufffd \0',
    # What a pattern such as (a+)+$ takes exponential time for.
    *(character * 30 + end for character in [*map(chr, range(32, 127)), "\n", "é"] for end in ("!", "a")),
    *(character * 2000 + "!" for character in "a1 \n"),
)


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
        for text in TEXTS:
            with contextlib.suppress(Exception):  # a text that it cannot encode; what is no Exception is a panic
                tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    except BaseException as error:
        sys.stdout.buffer.write((str(error) or type(error).__name__).encode())


if __name__ == "__main__":
    main()
